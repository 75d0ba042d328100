"""The demo: the whole chain on one machine, for the plan and for baselines of the same cluster."""
