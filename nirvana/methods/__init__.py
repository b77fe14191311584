"""Pruning methods: `registry` lists them, each has a file of its own, and `method` says what they have in common."""
