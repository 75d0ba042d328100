"""Whether nodes are fit to be measured and to serve."""
