"""Timing a stage: which batches, how often, and what disturbs them."""
