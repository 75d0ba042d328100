"""Profiling a cluster through the agents that serve it."""
