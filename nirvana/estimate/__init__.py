"""Memory, disk and time predicted."""
