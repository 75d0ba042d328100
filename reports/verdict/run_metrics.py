"""Metrics of a run that gates and comparisons refer to by name, each with the direction that is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from helixbench.errors import InputError, MeasurementError
from helixbench.reference_server.run_log import RequestRecord, RunLog
from helixbench.reports.verdict.integrity import check_run, intervals_in_window, tokens_of
from helixbench.reports.verdict.intervals import batch_means

# metric -> whether higher is better
IS_HIGHER_BETTER = {
    "total_tokens_per_s": True,
    "output_tokens_per_s": True,
    "ttft_mean_s": False,
    "tpot_mean_s": False,
    "ttft_p50_s": False,
    "ttft_p90_s": False,
    "ttft_p99_s": False,
    "tpot_p50_s": False,
    "tpot_p90_s": False,
    "tpot_p99_s": False,
    "goodput_per_s": True,
}


def metrics_of(run: RunLog) -> dict[str, float]:
    """Metric -> value. Empty if no request finished in the window; without TPOT if all outputs are one token long."""
    if not run.requests_in_window():
        return {}
    found = {"total_tokens_per_s": run.total_tokens_per_s, "output_tokens_per_s": run.output_tokens_per_s}
    for kind, values in (("ttft", ttfts(run)), ("tpot", tpots(run))):
        percentiles = run.latency_percentiles("ttft" if kind == "ttft" else "tpot", (50.0, 90.0, 99.0))
        if values and percentiles:
            found[f"{kind}_mean_s"] = sum(values) / len(values)
            found[f"{kind}_p50_s"], found[f"{kind}_p90_s"], found[f"{kind}_p99_s"] = percentiles
    if run.goodput_per_s is not None:
        found["goodput_per_s"] = run.goodput_per_s
    return found


def metric_of(run: RunLog, metric: str, *, origin: str) -> float:
    """One metric of a complete and consistent run.

    Raises:
        InputError: no such metric.
        MeasurementError: the run was cut short, contradicts itself, or finished no request in its window.
    """
    if metric not in IS_HIGHER_BETTER:
        raise InputError(f"metric {metric!r}: a run has {', '.join(IS_HIGHER_BETTER)}")
    if run.cut_short:
        raise MeasurementError(f"{origin}: the run was cut short: {run.cut_short}")
    for check in check_run(run):
        if not check.is_passed:
            raise MeasurementError(f"{origin}: the record contradicts itself: {check.message}")
    values = metrics_of(run)
    if metric not in values:
        raise MeasurementError(f"{origin}: no request finished inside the window, so there is no {metric}")
    return values[metric]


def batches_of(run: RunLog) -> dict[str, tuple[float, ...]]:
    """Metric -> its batch means over the window, for the metrics that are means.

    A batch is at least as long as a request, or holds as many requests as are in flight: requests of a closed loop tend
    to run in lockstep, so a shorter batch would contain all of their prompts or none.
    """
    inside = intervals_in_window(run)
    spans = [count.end_s - start for start, count in inside]
    per_request = _intervals_per_request(run, spans)
    series = {
        "total_tokens_per_s": ([tokens_of([c]) / s for (_, c), s in zip(inside, spans, strict=True)], per_request),
        "output_tokens_per_s": ([c.output_tokens / s for (_, c), s in zip(inside, spans, strict=True)], per_request),
        "ttft_mean_s": (ttfts(run), run.concurrency),
        "tpot_mean_s": (tpots(run), run.concurrency),
    }
    means = {name: batch_means(values, min_size=size) for name, (values, size) in series.items()}
    return {name: batches for name, batches in means.items() if batches}


def _intervals_per_request(run: RunLog, spans: Sequence[float]) -> int:
    """Timeline intervals that a request takes on average, rounded up; at least one."""
    requests = run.requests_in_window()
    if not requests or not spans:
        return 1
    request_s = sum(request.finish_s - run.began_s(request) for request in requests) / len(requests)
    return max(1, math.ceil(request_s * len(spans) / sum(spans)))


def ttfts(run: RunLog) -> list[float]:
    """Time to first token in seconds, in the order in which the requests finished in the window."""
    return _in_order(run, run.ttft_s)


def tpots(run: RunLog) -> list[float]:
    """Time per output token in seconds, in the order in which the requests finished in the window."""
    return _in_order(run, lambda request: request.tpot_s)


def _in_order(run: RunLog, value: Callable[[RequestRecord], float | None]) -> list[float]:
    requests: Sequence[RequestRecord] = sorted(run.requests_in_window(), key=lambda request: request.finish_s)
    return [found for request in requests if (found := value(request)) is not None]
