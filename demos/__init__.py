"""Demonstrations that make for themselves what no package carries."""
