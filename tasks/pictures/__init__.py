"""The figures of report and studies."""
