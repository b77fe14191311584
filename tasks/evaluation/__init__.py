"""What judges a model: held-out windows, tasks made from held-out documents, lm-eval."""
