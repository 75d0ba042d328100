"""Hold a run against its plan: a pure function from ``RunLog`` to ``Verdict``."""

from __future__ import annotations

from typing import Literal

from helixbench.profiler.cluster import COORDINATOR
from helixbench.records import digest
from helixbench.reference_server.run_log import LinkUse, NodeUse, RunLog
from helixbench.reports.verdict.causes import likely_causes
from helixbench.reports.verdict.integrity import check_run
from helixbench.reports.verdict.intervals import mean_interval
from helixbench.reports.verdict.metrics import batches_of
from helixbench.reports.verdict.verdict import (
    STALE_NOTE,
    Band,
    Check,
    Interval,
    Latency,
    LinkResidual,
    NodeResidual,
    Outcome,
    Verdict,
)
from helixbench.solver.problem.plan import Expected, LinkFlow

PERCENTS = (50.0, 90.0, 99.0)


def validate(run: RunLog, band: Band | None = None) -> Verdict:
    """What was served beside what was promised.

    The promise is the plan's expected entry at exactly the run's concurrency: between two entries nothing was
    predicted, so nothing is made up. A run that is incomplete, contradicts itself or has no promise to be held against
    could not be measured; it is never a pass.
    """
    band = band or Band()
    expected = expected_at(run)
    checks = check_run(run)
    missing = _why_not_measured(run, expected, checks)
    measured = run.total_tokens_per_s if run.requests_in_window() else None
    bound = run.plan.predicted.max_flow_tokens_per_s
    to_expected = _ratio(measured, expected.total_tokens_per_s if expected else None)
    to_bound = _ratio(measured, bound)
    outcome = "could not measure" if missing else _outcome(to_expected, to_bound, band)
    nodes = _node_residuals(run, expected)
    return Verdict(
        outcome=outcome,
        statement=_statement(run, outcome, to_expected, to_bound, band, missing),
        reasons=missing,
        causes=() if missing else likely_causes(nodes, ratio=to_expected),
        band=band,
        concurrency=run.concurrency,
        bound_tokens_per_s=bound,
        upper_bound_tokens_per_s=run.plan.predicted.upper_bound_tokens_per_s,
        expected_tokens_per_s=expected.total_tokens_per_s if expected else None,
        expected_interval=_expected_interval(expected),
        measured_tokens_per_s=measured,
        measured_interval=measured_interval(run),
        measured_output_tokens_per_s=run.output_tokens_per_s if measured is not None else None,
        ratio_to_expected=to_expected,
        ratio_to_bound=to_bound,
        bottleneck=run.plan.predicted.bottleneck,
        nodes=nodes,
        links=_link_residuals(run),
        latencies=_latencies(run, expected),
        checks=checks,
        is_simulated=run.simulated,
        testbed=run.testbed,
        notes=(*(f"{STALE_NOTE}{line}" for line in run.stale), *run.plan.assumptions.notes),
        plan_digest=digest(run.plan),
        run_digest=digest(run),
        provenance=run.provenance,
    )


def expected_at(run: RunLog) -> Expected | None:
    """The plan's promise for exactly the run's load; ``None`` where it makes none, as for arrivals at a rate.

    That is its entry at the run's concurrency; where all requests were there from the start, also the one that it makes
    for as many in flight as the KV caches hold.
    """
    promises = run.plan.predicted.expected
    if run.arrivals not in ("closed loop", "offline"):
        return None
    for entry in promises:
        if entry.concurrency == run.concurrency:
            return entry
    is_full = run.arrivals == "offline" and not run.is_limited and run.plan.assumptions.concurrency is None
    return promises[-1] if is_full and promises else None


def measured_interval(run: RunLog) -> Interval | None:
    """95 % interval of total tokens/s from batch means of the window; it covers this run, not the next one.

    ``None`` where the window is too short for it.
    """
    means = batches_of(run).get("total_tokens_per_s")
    return mean_interval(means) if means else None


def _why_not_measured(run: RunLog, expected: Expected | None, checks: tuple[Check, ...]) -> tuple[str, ...]:
    reasons = []
    if run.cut_short:
        reasons.append(f"the run was cut short: {run.cut_short}")
    if not run.requests_in_window():
        reasons.append("no request finished inside the window: run longer, or with shorter outputs")
    if run.prompt_tokens + run.output_tokens == 0:
        reasons.append("no token was counted inside the window")
    if expected is None and run.arrivals not in ("closed loop", "offline"):
        reasons.append(f"requests came at a rate ({run.arrivals}), for which a plan promises nothing")
    elif expected is None:
        known = ", ".join(str(entry.concurrency) for entry in run.plan.predicted.expected) or "none"
        reasons.append(
            f"no prediction at this concurrency ({run.concurrency}); the plan predicts {known}: "
            f"plan again with --concurrency {run.concurrency}"
        )
    reasons += [f"the record contradicts itself: {check.message}" for check in checks if not check.is_passed]
    return tuple(reasons)


def _ratio(value: float | None, to: float | None) -> float | None:
    return None if value is None or not to else value / to


def _outcome(to_expected: float | None, to_bound: float | None, band: Band) -> Outcome:
    if to_expected is None or to_bound is None:
        return "could not measure"
    if to_bound > band.max_bound_ratio:
        return "above bound"
    if to_expected < band.min_ratio:
        return "below expected"
    return "above expected" if to_expected > band.max_ratio else "as predicted"


def _statement(
    run: RunLog,
    outcome: Outcome,
    to_expected: float | None,
    to_bound: float | None,
    band: Band,
    missing: tuple[str, ...],
) -> str:
    if outcome == "could not measure" or to_expected is None or to_bound is None:
        what = "Could not measure (a simulated run): " if run.simulated else "Could not measure: "
        return what + ("; ".join(missing) or "the plan promises no flow") + "."
    verb = "simulated" if run.simulated else "measured"
    held = f"{verb} {run.total_tokens_per_s:,.4g} tokens/s = {to_expected:.3f} x expected, {to_bound:.3f} x bound"
    within = f"{band.min_ratio:g} .. {band.max_ratio:g}"
    return {
        "as predicted": f"As predicted: {held}; the ratio lies within {within}.",
        "below expected": f"Below expected: {held}; at least {band.min_ratio:g} was promised.",
        "above expected": f"Above expected: {held}; over {band.max_ratio:g} the model is too pessimistic.",
        "above bound": f"Above the bound: {held}. No run can be: an error in the model or the units.",
    }[outcome]


def _expected_interval(expected: Expected | None) -> Interval | None:
    if expected is None or expected.low_total_tokens_per_s is None or expected.high_total_tokens_per_s is None:
        return None
    return Interval(expected.low_total_tokens_per_s, expected.high_total_tokens_per_s)


def _node_residuals(run: RunLog, expected: Expected | None) -> tuple[NodeResidual, ...]:
    """Nodes in the order of their layers, the coordinator last.

    A node's share is of the tokens that entered the model, counted by the nodes that hold its first layer: the same
    counters on both sides, so what is in flight at the window's edges hardly matters.
    """
    placement = run.plan.placement
    entered = sum(
        _node_tokens(run.nodes[name]) for name in placement if placement[name].start == 0 if name in run.nodes
    )
    names = sorted(placement, key=lambda name: (placement[name], name))
    if COORDINATOR in run.nodes:
        names.append(COORDINATOR)
    return tuple(_node_residual(run, name, expected, entered) for name in names if name in run.nodes)


def _node_residual(run: RunLog, name: str, expected: Expected | None, entered: int) -> NodeResidual:
    use, flow = run.nodes[name], run.plan.nodes.get(name)
    planned = _ratio(flow.flow_tokens_per_s if flow else None, run.plan.predicted.max_flow_tokens_per_s)
    busy = expected.node_busy.get(name) if expected else None
    batch = expected.node_batch_tokens.get(name) if expected else None
    return NodeResidual(
        name=name,
        layers=run.plan.placement.get(name),
        planned_share=1.0 if planned is None else planned,
        realised_share=_ratio(_node_tokens(use), entered) or 0.0,
        predicted_busy=busy,
        measured_busy=use.busy_s / run.window.seconds,
        predicted_batch_tokens=batch,
        measured_batch_tokens=_ratio(use.decode_tokens, use.iterations),
        predicted_iteration_s=_predicted_iteration_s(run, expected, planned, busy, batch),
        measured_iteration_s=_ratio(use.busy_s, use.iterations),
        kv_peak_tokens=use.kv_peak_tokens,
        kv_capacity_tokens=use.kv_capacity_tokens,
    )


def _node_tokens(use: NodeUse) -> int:
    return use.prefill_tokens + use.decode_tokens


def _predicted_iteration_s(
    run: RunLog, expected: Expected | None, share: float | None, busy: float | None, batch: float | None
) -> float | None:
    """Busy time over iterations: a node decodes its share of the output tokens, ``batch`` of them an iteration.

    A request's first output token is its prompt's, and decoded nowhere.
    """
    if expected is None or share is None or busy is None or batch is None:
        return None
    mean_output = run.plan.assumptions.workload.mean_output_tokens
    decoded_per_s = expected.output_tokens_per_s * (mean_output - 1) / mean_output
    return _ratio(busy * batch, share * decoded_per_s)


def _link_residuals(run: RunLog) -> tuple[LinkResidual, ...]:
    """Planned links in the plan's order, then links that carried tokens without being planned."""
    planned = {(flow.src, flow.dst): flow for flow in run.plan.flows}
    used = {(use.src, use.dst): use for use in run.links}
    return tuple(
        _link_residual(run, src, dst, planned.get((src, dst)), used.get((src, dst)))
        for src, dst in {**planned, **used}
        if (src, dst) in planned or used[(src, dst)].tokens  # a link may carry only what keeps the cluster together
    )


def _link_residual(run: RunLog, src: str, dst: str, flow: LinkFlow | None, use: LinkUse | None) -> LinkResidual:
    """Shares at the coordinator's own links are of what leaves it, or of what enters it: each way adds up to one."""
    is_return = dst == COORDINATOR
    total = sum(other.tokens for other in run.links if (other.dst if is_return else other.src) == COORDINATOR)
    return LinkResidual(
        src=src,
        dst=dst,
        planned_share=_ratio(flow.flow_tokens_per_s if flow else 0.0, run.plan.predicted.max_flow_tokens_per_s) or 0.0,
        realised_share=_ratio(use.tokens if use else 0, total) or 0.0,
        measured_bytes_per_s=(use.payload_bytes if use else 0) / run.window.seconds,
    )


def _latencies(run: RunLog, expected: Expected | None) -> tuple[Latency, ...]:
    promised = {"ttft": expected.ttft_s if expected else None, "tpot": expected.tpot_s if expected else None}
    kinds: tuple[Literal["ttft", "tpot"], ...] = ("ttft", "tpot")
    found = (_latency(run, kind, promised[kind]) for kind in kinds)
    return tuple(latency for latency in found if latency is not None)


def _latency(run: RunLog, kind: Literal["ttft", "tpot"], predicted_s: float | None) -> Latency | None:
    percentiles = run.latency_percentiles(kind, PERCENTS)
    if percentiles is None:
        return None
    requests = run.requests_in_window()
    values = (
        [run.ttft_s(r) for r in requests] if kind == "ttft" else [r.tpot_s for r in requests if r.tpot_s is not None]
    )
    return Latency(
        kind=kind,
        num_requests=len(values),
        predicted_mean_s=predicted_s,
        mean_s=sum(values) / len(values),
        p50_s=percentiles[0],
        p90_s=percentiles[1],
        p99_s=percentiles[2],
    )
