"""The only place that knows model families: for each, its sites and its walk."""
