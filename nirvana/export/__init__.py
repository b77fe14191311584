"""Pruned checkpoints as files that other tools load, one format a file."""
