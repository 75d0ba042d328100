"""What the HTTP front counts, for Prometheus. Each app has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
TPOT_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)


class Metrics:
    """Counters and histograms of requests; a request here is one prompt."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "helixbench_requests",
            "Requests that ended, by how: stop, length, aborted, refused, failed.",
            ["outcome"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "helixbench_prompt_tokens", "Prompt tokens of requests that got a first token.", registry=self.registry
        )
        self.output_tokens = Counter("helixbench_output_tokens", "Tokens generated.", registry=self.registry)
        self.in_flight = Gauge("helixbench_requests_in_flight", "Requests taken and not ended.", registry=self.registry)
        self.ttft_s = Histogram(
            "helixbench_ttft_seconds",
            "Arrival to first output token.",
            buckets=TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self.tpot_s = Histogram(
            "helixbench_tpot_seconds",
            "Time per output token after the first, of requests with two or more.",
            buckets=TPOT_BUCKETS_S,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
