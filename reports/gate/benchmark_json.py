"""Samples in the JSON of pytest-benchmark, which ``pytest-benchmark compare`` and github-action-benchmark read."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from helixbench.reference_server.run_log import RunLog
from helixbench.reports.compare.regression import Regression
from helixbench.reports.verdict.run_metrics import batches_of, tpots, ttfts

# The file layout of pytest-benchmark 4 and 5.
VERSION = "5.0.0"


def run_samples(run: RunLog) -> dict[str, tuple[float, ...]]:
    """Benchmark name -> seconds: latencies per request, throughput as seconds per token of each batch of the window.

    Simulated runs have names of their own, so that no series mixes them with measured ones.
    """
    per_token = tuple(1 / rate for rate in batches_of(run).get("total_tokens_per_s", ()) if rate > 0)
    samples = {"ttft": tuple(ttfts(run)), "tpot": tuple(tpots(run)), "seconds_per_token": per_token}
    prefix = "simulated " if run.simulated else ""
    return {f"{prefix}{name}": values for name, values in samples.items() if values}


def regression_samples(regression: Regression) -> dict[str, tuple[float, ...]]:
    """Benchmark name -> seconds, for both sides; a metric of which more is better counts as a rate and is inverted."""
    metric, is_rate = regression.question.metric, regression.question.is_higher_better
    sides = {"base": [pair.base for pair in regression.pairs], "new": [pair.new for pair in regression.pairs]}
    return {
        f"{metric}[{side}]": tuple(1 / value if is_rate else value for value in values if value > 0)
        for side, values in sides.items()
        if values
    }


def benchmark_json(samples: Mapping[str, Sequence[float]]) -> dict[str, object]:
    """The file as a JSON-ready object. Samples are in seconds, at least one per benchmark."""
    return {
        "machine_info": {
            "node": platform.node(),
            "machine": platform.machine(),
            "python_implementation": platform.python_implementation(),
            "python_version": platform.python_version(),
            "system": platform.system(),
            "release": platform.release(),
            "cpu": {"brand_raw": platform.processor() or platform.machine()},
        },
        "commit_info": {"id": "unversioned", "time": None, "dirty": False, "branch": "(unknown)"},
        "benchmarks": [
            {
                "group": "helixbench",
                "name": name,
                "fullname": f"helixbench::{name}",
                "params": None,
                "param": None,
                "extra_info": {},
                "options": {},
                "stats": statistics_of(values),
            }
            for name, values in samples.items()
        ],
        "datetime": datetime.now(UTC).isoformat(),
        "version": VERSION,
    }


def statistics_of(values: Sequence[float]) -> dict[str, object]:
    """The statistics of one benchmark. Outliers are beyond one standard deviation; beyond 1.5 IQR of the quartiles."""
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    fence = 1.5 * (q3 - q1)
    beyond_deviation = sum(abs(value - mean) > deviation for value in values)
    beyond_fence = sum(not q1 - fence <= value <= q3 + fence for value in values)
    return {
        "min": min(values),
        "max": max(values),
        "mean": mean,
        "stddev": deviation,
        "rounds": len(values),
        "median": median,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "outliers": f"{beyond_deviation};{beyond_fence}",
        "ops": 1 / mean if mean else 0.0,
        "total": math.fsum(values),
        "data": list(values),
        "iterations": 1,
    }
