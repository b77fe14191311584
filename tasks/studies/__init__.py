"""Studies: the paper's experiments, computed outside the pipeline; flows of the same names drive them."""
