"""Families: whether the ranking of the methods holds in each."""
