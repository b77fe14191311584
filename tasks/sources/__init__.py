"""Where models and corpora come from, and what a model directory has to hold."""
