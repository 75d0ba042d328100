"""Bandwidth and latency of links and NICs."""
