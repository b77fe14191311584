"""Studies: the paper's experiments, computed outside the pipeline; a package each, what they share beside them."""
