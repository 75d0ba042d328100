"""Proven bounds on max-flow, expected throughput and latency of any plan."""
