"""Max-flow of one placement, and what follows from it: pipelines, bottleneck, marginal gains."""
