"""Sweeps: variants of one method, in gamma, in the rounding of neurons, in where weights leave."""
