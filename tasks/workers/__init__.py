"""Processes: the one of a step, and those that compute candidates beside it."""
