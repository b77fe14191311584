"""Pruned checkpoints that load anywhere."""
