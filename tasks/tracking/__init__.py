"""Where runs are recorded, and what may be told there."""
