"""Fine-tuning: what is left of the methods' differences after it."""
