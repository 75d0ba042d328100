"""Samples in the JSON of pytest-benchmark: read by ``pytest-benchmark compare`` and by github-action-benchmark."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from helixbench.reference_server.run_log import RunLog
from helixbench.reports.compare.regression import Regression
from helixbench.reports.verdict.metrics import batches_of, tpots, ttfts

# The layout of the files that pytest-benchmark 4 and 5 write.
VERSION = "5.0.0"


def run_samples(run: RunLog) -> dict[str, tuple[float, ...]]:
    """Benchmark name -> seconds: latencies by request; throughput as seconds per token, by parts of the window.

    Those of a simulated run have names of their own, so that no series mixes the two.
    """
    per_token = tuple(1 / rate for rate in batches_of(run).get("total_tokens_per_s", ()) if rate > 0)
    samples = {"ttft": tuple(ttfts(run)), "tpot": tuple(tpots(run)), "seconds_per_token": per_token}
    prefix = "simulated " if run.simulated else ""
    return {f"{prefix}{name}": values for name, values in samples.items() if values}


def regression_samples(regression: Regression) -> dict[str, tuple[float, ...]]:
    """Both sides' values of the metric; a rate (``..._per_s``) is turned into seconds."""
    metric = regression.question.metric
    is_rate = regression.question.is_higher_better
    sides = {"base": [pair.base for pair in regression.pairs], "new": [pair.new for pair in regression.pairs]}
    return {
        f"{metric}[{side}]": tuple(1 / value if is_rate else value for value in values if value > 0)
        for side, values in sides.items()
        if values
    }


def benchmark_json(
    samples: Mapping[str, Sequence[float]], *, extra: Mapping[str, object] | None = None
) -> dict[str, object]:
    """The whole file as a JSON-ready object; every list of samples is in seconds and not empty."""
    return {
        "machine_info": {
            "node": platform.node(),
            "processor": platform.processor(),
            "machine": platform.machine(),
            "python_implementation": platform.python_implementation(),
            "python_version": platform.python_version(),
            "system": platform.system(),
            "release": platform.release(),
            "cpu": {"brand_raw": platform.processor() or platform.machine()},
        },
        "commit_info": {"id": "unversioned", "time": None, "dirty": False, "branch": "(unknown)"},
        "benchmarks": [_benchmark(name, values, dict(extra or {})) for name, values in samples.items()],
        "datetime": datetime.now(UTC).isoformat(),
        "version": VERSION,
    }


def _benchmark(name: str, values: Sequence[float], extra: dict[str, object]) -> dict[str, object]:
    return {
        "group": "helixbench",
        "name": name,
        "fullname": f"helixbench::{name}",
        "params": None,
        "param": None,
        "extra_info": extra,
        "options": {
            "disable_gc": False,
            "timer": "perf_counter",
            "min_rounds": len(values),
            "max_time": 0.0,
            "min_time": 0.0,
            "warmup": False,
        },
        "stats": statistics_of(values),
    }


def statistics_of(values: Sequence[float]) -> dict[str, object]:
    """The statistics that pytest-benchmark keeps, by its own definitions."""
    ordered = sorted(values)
    n, mean = len(ordered), statistics.fmean(ordered)
    deviation = statistics.stdev(ordered) if n > 1 else 0.0
    median = statistics.median(ordered)
    low, high = _quartiles(ordered)
    spread = high - low
    inner = [value for value in ordered if low - 1.5 * spread <= value <= high + 1.5 * spread]
    beyond_iqr = n - len(inner)
    beyond_deviation = sum(abs(value - mean) > deviation for value in ordered)
    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "stddev": deviation,
        "rounds": n,
        "median": median,
        "iqr": spread,
        "q1": low,
        "q3": high,
        "iqr_outliers": beyond_iqr,
        "stddev_outliers": beyond_deviation,
        "outliers": f"{beyond_deviation};{beyond_iqr}",
        "ld15iqr": inner[0],
        "hd15iqr": inner[-1],
        "ops": 1 / mean if mean else 0.0,
        "total": math.fsum(ordered),
        "data": list(values),
        "iterations": 1,
    }


def _quartiles(ordered: Sequence[float]) -> tuple[float, float]:
    return _first_quartile(ordered), _first_quartile(ordered[::-1])


def _first_quartile(ordered: Sequence[float]) -> float:
    """The lower half's median; of an odd number of values, the two nearest weighted 1 to 3 (Tukey's hinge, refined)."""
    n = len(ordered)
    if n == 1:
        return ordered[0]
    if n % 2 == 0:
        return statistics.median(ordered[: n // 2])
    k = n // 4
    if n % 4 == 1:
        return 0.25 * ordered[k - 1] + 0.75 * ordered[k]
    return 0.75 * ordered[k] + 0.25 * ordered[k + 1]
