"""What a plan promises for arrivals of an open loop: the simulation of them on the profile that the plan was made for.

A plan's own figures are for a number of requests in flight. At a given rate the number in flight is what comes out, so
the same requests are simulated: the same seed gives the same arrivals and lengths as the measured run. Nothing that was
measured enters.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Literal

from helixbench.profiler.cluster import COORDINATOR
from helixbench.reference_server.run_log import RunLog
from helixbench.reference_server.simulation.config import SimulationConfig
from helixbench.reference_server.simulation.simulator import simulate
from helixbench.solver.problem.plan import Expected, Percentiles, Plan


def promise(
    plan: Plan,
    config: SimulationConfig,
    *,
    on_progress: Callable[[float, float], None] = lambda _done, _total: None,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Expected | None:
    """Throughput and latency of the load; ``None`` where the plan does not hold its cluster's profile.

    Args:
        plan: what is served.
        config: the load.
        on_progress: called with (done, total), in seconds or requests.
        is_interrupted: polled.

    Raises:
        InputError: plan and load do not belong together.
        MeasurementError: no request ends inside the window.
    """
    if plan.cluster is None:
        return None
    found = simulate(plan, plan.cluster, config, on_progress=on_progress, is_interrupted=is_interrupted)
    return expected_of_run(found.run)


def expected_of_run(run: RunLog) -> Expected:
    """What a simulated run shows, as a prediction."""
    nodes = {name: use for name, use in run.nodes.items() if name != COORDINATOR}
    ttft, tpot = _percentiles(run, "ttft"), _percentiles(run, "tpot")
    return Expected(
        concurrency=run.concurrency,
        total_tokens_per_s=run.total_tokens_per_s,
        output_tokens_per_s=run.output_tokens_per_s,
        ttft_s=_mean([run.ttft_s(request) for request in run.requests_in_window()]),
        tpot_s=_mean([request.tpot_s for request in run.requests_in_window()]),
        ttft=ttft,
        tpot=tpot,
        goodput_per_s=run.goodput_per_s,
        node_busy={name: min(1.0, use.busy_s / run.window.seconds) for name, use in nodes.items()},
        node_batch_tokens={name: use.decode_tokens / max(1, use.iterations) for name, use in nodes.items()},
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _percentiles(run: RunLog, kind: Literal["ttft", "tpot"]) -> Percentiles | None:
    values = run.latency_percentiles(kind, (50.0, 90.0, 99.0))
    return None if values is None else Percentiles(*values)
