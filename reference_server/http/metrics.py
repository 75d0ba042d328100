"""Metrics of the HTTP server, for Prometheus: under this project's names, and under those that dashboards look for.

The second set is vLLM's, so that its dashboards show this server. Each app has a registry of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from helixbench.reference_server.http.engine_protocol import Health, Load

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
TPOT_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
E2E_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
MODEL_LABEL = "model_name"


class Metrics:
    """Counters, gauges and histograms of requests; a request here is one output.

    Args:
        load: how busy the engine is, asked when metrics are read.
        health: how its nodes stand, likewise.
        model_name: label of the names that dashboards look for.
    """

    def __init__(self, load: Callable[[], Load], health: Callable[[], Health], model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Nodes(health))
        self._model_name = model_name
        self.requests = self._counter(
            "helixbench_requests", "Ended requests by how: stop, length, aborted, refused, failed.", "outcome"
        )
        self.prompt_tokens = self._counter("helixbench_prompt_tokens", "Prompt tokens of requests with a first token.")
        self.output_tokens = self._counter("helixbench_output_tokens", "Tokens generated.")
        self.in_flight = Gauge(
            "helixbench_requests_in_flight", "Requests accepted and not ended.", registry=self._registry
        )
        self.ttft_s = self._histogram("helixbench_ttft_seconds", "Arrival to first output token.", TTFT_BUCKETS_S)
        self.tpot_s = self._histogram(
            "helixbench_tpot_seconds", "Time per output token after the first, of requests with more.", TPOT_BUCKETS_S
        )
        self.vllm_success = self._counter(
            "vllm:request_success", "Requests that ended with stop or length.", "finished_reason", MODEL_LABEL
        )
        self.vllm_prompt_tokens = self._labelled_counter("vllm:prompt_tokens", "Prompt tokens.")
        self.vllm_output_tokens = self._labelled_counter("vllm:generation_tokens", "Tokens generated.")
        self.vllm_ttft_s = self._labelled_histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first output token.", TTFT_BUCKETS_S
        )
        self.vllm_itl_s = self._labelled_histogram(
            "vllm:inter_token_latency_seconds", "From one output token to the next.", TPOT_BUCKETS_S
        )
        self.vllm_e2e_s = self._labelled_histogram(
            "vllm:e2e_request_latency_seconds", "Arrival to last output token.", E2E_BUCKETS_S
        )
        late = Gauge(
            "helixbench_late_iterations",
            "Iterations of emulated devices that took longer than they were to take: above 1 % figures are unsound.",
            registry=self._registry,
        )
        late.set_function(lambda: load().late_iterations)
        self._gauge("vllm:num_requests_running", "Requests that hold KV slots.", lambda: load().num_running)
        self._gauge("vllm:num_requests_waiting", "Requests that wait for KV slots.", lambda: load().num_waiting)
        self._gauge("vllm:kv_cache_usage_perc", "Share of KV slots held, 1 is all.", lambda: load().kv_usage)

    def begin(self, *, num_prompt_tokens: int, now_s: float) -> RequestWatch:
        """A request has arrived."""
        self.in_flight.inc()
        return RequestWatch(self, num_prompt_tokens, now_s)

    def ended(self, outcome: str) -> None:
        """A request has ended."""
        self.in_flight.dec()
        self.requests.labels(outcome).inc()
        if outcome in ("stop", "length"):
            self.vllm_success.labels(outcome, self._model_name).inc()

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, help_: str, *labels: str) -> Counter:
        return Counter(name, help_, labels, registry=self._registry)

    def _histogram(self, name: str, help_: str, buckets_s: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_, buckets=buckets_s, registry=self._registry)

    def _labelled_counter(self, name: str, help_: str) -> Counter:
        return self._counter(name, help_, MODEL_LABEL).labels(self._model_name)

    def _labelled_histogram(self, name: str, help_: str, buckets_s: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, help_, [MODEL_LABEL], buckets=buckets_s, registry=self._registry)
        return histogram.labels(self._model_name)

    def _gauge(self, name: str, help_: str, value: Callable[[], float]) -> None:
        gauge = Gauge(name, help_, [MODEL_LABEL], registry=self._registry)
        gauge.labels(self._model_name).set_function(value)


class _Nodes(Collector):
    """How nodes stand, as gauges with the node as a label."""

    def __init__(self, health: Callable[[], Health]) -> None:
        self._health = health

    def collect(self) -> Iterable[Metric]:
        """The gauges, and how many requests went on another way."""
        health = self._health()
        state = GaugeMetricFamily(
            "helixbench_node_state", "1 for the state that the node is in.", labels=["node", "state"]
        )
        ratio = GaugeMetricFamily(
            "helixbench_node_time_ratio", "Measured over predicted time of the node's iterations.", labels=["node"]
        )
        for name, node in health.nodes.items():
            state.add_metric([name, node.state], 1)
            ratio.add_metric([name], node.ratio)
        recovered = CounterMetricFamily(
            "helixbench_requests_recovered", "Requests that lost their pipeline, by how they went on.", labels=["how"]
        )
        for how, count in health.recovered.items():
            recovered.add_metric([how], count)
        return [state, ratio, recovered]


class RequestWatch:
    """Times of one request."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int, arrival_s: float) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._arrival_s = arrival_s
        self._first_s = self._last_s = arrival_s
        self._num_tokens = 0

    def token(self, now_s: float) -> None:
        """An output token has come."""
        metrics = self._metrics
        self._num_tokens += 1
        if self._num_tokens == 1:
            self._first_s = now_s
            for ttft_s in (metrics.ttft_s, metrics.vllm_ttft_s):
                ttft_s.observe(now_s - self._arrival_s)
            for counter in (metrics.prompt_tokens, metrics.vllm_prompt_tokens):
                counter.inc(self._num_prompt_tokens)
        else:
            metrics.vllm_itl_s.observe(now_s - self._last_s)
        self._last_s = now_s
        metrics.output_tokens.inc()
        metrics.vllm_output_tokens.inc()

    def end(self, outcome: str, now_s: float) -> None:
        """The request has ended."""
        self._metrics.ended(outcome)
        if outcome in ("stop", "length"):
            self._metrics.vllm_e2e_s.observe(now_s - self._arrival_s)
            if self._num_tokens > 1:
                self._metrics.tpot_s.observe((self._last_s - self._first_s) / (self._num_tokens - 1))
