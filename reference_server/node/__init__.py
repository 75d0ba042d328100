"""The process on a node: an agent and its runtime."""
