"""Quantised: what pruning and few bits cost together."""
