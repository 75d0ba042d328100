"""Compare a run with its plan: a pure function from ``RunLog`` to ``Verdict``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from helixbench.profiler.cluster import COORDINATOR
from helixbench.records import digest
from helixbench.reference_server.run_log import LinkUse, NodeUse, RunLog
from helixbench.reports.verdict.causes import likely_causes
from helixbench.reports.verdict.client import ClientLatency, ClientResult
from helixbench.reports.verdict.integrity import check_run
from helixbench.reports.verdict.intervals import mean_interval
from helixbench.reports.verdict.run_metrics import batches_of, tpots, ttfts
from helixbench.reports.verdict.verdict import (
    Band,
    Check,
    ClientVerdict,
    Interval,
    Latency,
    LinkResidual,
    NodeResidual,
    Outcome,
    Verdict,
)
from helixbench.solver.problem.plan import Expected, LinkFlow, Percentiles

PERCENTS = (50.0, 90.0, 99.0)
# These arrivals keep a known number of requests in flight, for which the plan has its own entries.
PREDICTED_ARRIVALS = ("closed loop", "offline")
# Share of emulated iterations that may take longer than on their device.
MAX_LATE_SHARE = 0.01


def validate(run: RunLog, band: Band | None = None, *, client: ClientResult | None = None) -> Verdict:
    """Measured performance beside predicted performance, and the verdict.

    The prediction is the plan's expected entry at exactly the run's concurrency; nothing is interpolated. For arrivals
    of an open loop it is the plan's simulation of them, which also promises percentiles of latency. A run that is
    incomplete, contradicts itself or has no prediction could not be measured, which is never a pass. What another
    ``client`` measured of the same plan is held to the same prediction and band.
    """
    band = band or Band()
    expected = expected_at(run)
    checks = check_run(run)
    reasons = _why_not_measured(run, expected, checks)
    measured = run.total_tokens_per_s if run.requests_in_window() else None
    bound = run.plan.predicted.max_flow_tokens_per_s
    to_expected = _ratio(measured, expected.total_tokens_per_s if expected else None)
    to_bound = _ratio(measured, bound)
    latencies = latencies_of(run, expected)
    outcome = Outcome.NOT_MEASURED if reasons else _outcome(to_expected, to_bound, latencies, band)
    if not reasons and (late := _why_unsound(run)):
        outcome, reasons = Outcome.UNSOUND, (late,)
    nodes = _node_residuals(run, expected)
    return Verdict(
        outcome=outcome,
        statement=_statement(run, outcome, to_expected, to_bound, latencies, band, reasons),
        reasons=reasons,
        causes=() if reasons else likely_causes(nodes, ratio=to_expected),
        band=band,
        concurrency=run.concurrency,
        arrivals=run.arrivals,
        bound_tokens_per_s=bound,
        upper_bound_tokens_per_s=run.plan.predicted.upper_bound_tokens_per_s,
        expected_tokens_per_s=expected.total_tokens_per_s if expected else None,
        expected_interval=_expected_interval(expected),
        measured_tokens_per_s=measured,
        measured_interval=measured_interval(run),
        measured_output_tokens_per_s=run.output_tokens_per_s if measured is not None else None,
        ratio_to_expected=to_expected,
        ratio_to_bound=to_bound,
        goodput_per_s=run.goodput_per_s,
        promised_goodput_per_s=expected.goodput_per_s if expected else None,
        goodput_limits="" if run.limits is None else str(run.limits),
        bottleneck=run.plan.predicted.bottleneck,
        nodes=nodes,
        links=_link_residuals(run, expected),
        latencies=latencies,
        checks=checks,
        is_simulated=run.simulated,
        is_emulated=bool(run.emulated),
        testbed=run.testbed,
        stale=run.stale,
        notes=tuple(
            dict.fromkeys(
                (
                    *([run.output_check.statement] if run.output_check else []),
                    *run.workload.notes,
                    *run.plan.assumptions.notes,
                )
            )
        ),
        plan_digest=digest(run.plan),
        run_digest=digest(run),
        provenance=run.provenance,
        client=None if client is None else _client_verdict(client, run, expected, measured, band),
    )


def _client_verdict(
    client: ClientResult, run: RunLog, expected: Expected | None, measured: float | None, band: Band
) -> ClientVerdict:
    total = client.total_tokens_per_s
    to_expected = _ratio(total, expected.total_tokens_per_s if expected else None)
    to_bound = _ratio(total, run.plan.predicted.max_flow_tokens_per_s)
    latencies = tuple(_client_latencies(client, run, expected))
    outcome = _outcome(to_expected, to_bound, latencies, band)
    figures = f"{client.client}: {total:,.4g} tokens/s of {client.num_requests} requests"
    if client.num_failed:
        figures += f", {client.num_failed} more failed"
    if client.concurrency is not None and run.arrivals in PREDICTED_ARRIVALS and client.concurrency != run.concurrency:
        figures += f", with {client.concurrency} in flight instead of {run.concurrency}"
    if to_expected is None:
        return ClientVerdict(
            result=client,
            outcome=outcome,
            statement=f"{figures}; there is no prediction to hold it to",
            ratio_to_expected=None,
            ratio_to_measured=_ratio(total, measured),
            latencies=latencies,
        )
    late = "".join(f"; {one}" for one in _late(latencies, band))
    return ClientVerdict(
        result=client,
        outcome=outcome,
        statement=f"{figures} = {to_expected:.3f} x expected ({outcome}){late}",
        ratio_to_expected=to_expected,
        ratio_to_measured=_ratio(total, measured),
        latencies=latencies,
    )


def _client_latencies(client: ClientResult, run: RunLog, expected: Expected | None) -> Iterator[Latency]:
    """Those of which the client states all percentiles."""
    kinds: tuple[tuple[Literal["ttft", "tpot"], ClientLatency], ...] = (("ttft", client.ttft), ("tpot", client.tpot))
    for kind, stated in kinds:
        if None in (stated.mean_s, stated.p50_s, stated.p90_s, stated.p99_s):
            continue
        yield Latency(
            kind=kind,
            num_requests=client.num_requests,
            predicted_mean_s=getattr(expected, f"{kind}_s", None),
            mean_s=stated.mean_s or 0.0,
            p50_s=stated.p50_s or 0.0,
            p90_s=stated.p90_s or 0.0,
            p99_s=stated.p99_s or 0.0,
            promised=getattr(expected, kind, None),
            is_held=run.arrivals not in PREDICTED_ARRIVALS,
        )


def expected_at(run: RunLog) -> Expected | None:
    """The plan's prediction for exactly this load; ``None`` if it has none.

    For arrivals of an open loop that is the simulation of them that the run was made with.
    Usually the entry at the run's concurrency. An offline run without limits keeps the KV caches full, so it also
    matches the entry that a plan without a set concurrency makes for full caches: its last one.
    """
    if run.arrivals not in PREDICTED_ARRIVALS:
        return run.promised
    entries = run.plan.predicted.expected
    for entry in entries:
        if entry.concurrency == run.concurrency:
            return entry
    is_full = run.arrivals == "offline" and not run.is_limited and run.plan.assumptions.concurrency is None
    return entries[-1] if is_full and entries else None


def measured_interval(run: RunLog) -> Interval | None:
    """95 % interval of total tokens/s from batch means: the noise within this run, not between runs.

    ``None`` if the window is too short.
    """
    means = batches_of(run).get("total_tokens_per_s")
    return mean_interval(means) if means else None


def latencies_of(run: RunLog, expected: Expected | None) -> tuple[Latency, ...]:
    """TTFT and TPOT of the requests that finished in the window; those without any value are left out."""
    ttft_s, tpot_s = (expected.ttft_s, expected.tpot_s) if expected else (None, None)
    ttft, tpot = (expected.ttft, expected.tpot) if expected else (None, None)
    found = (_latency(run, "ttft", ttfts(run), ttft_s, ttft), _latency(run, "tpot", tpots(run), tpot_s, tpot))
    return tuple(latency for latency in found if latency is not None)


def _latency(
    run: RunLog,
    kind: Literal["ttft", "tpot"],
    values: list[float],
    predicted_s: float | None,
    promised: Percentiles | None,
) -> Latency | None:
    percentiles = run.latency_percentiles(kind, PERCENTS)
    if percentiles is None:
        return None
    p50_s, p90_s, p99_s = percentiles
    return Latency(
        kind=kind,
        num_requests=len(values),
        predicted_mean_s=predicted_s,
        mean_s=sum(values) / len(values),
        p50_s=p50_s,
        p90_s=p90_s,
        p99_s=p99_s,
        promised=promised,
        is_held=run.arrivals not in PREDICTED_ARRIVALS,
    )


def _why_not_measured(run: RunLog, expected: Expected | None, checks: tuple[Check, ...]) -> tuple[str, ...]:
    reasons = []
    if run.cut_short:
        reasons.append(f"the run was cut short: {run.cut_short}")
    if run.output_check is not None and run.output_check.differing:
        reasons.append(run.output_check.statement)
    if not run.requests_in_window():
        reasons.append("no request finished inside the window: run longer, or with shorter outputs")
    if run.prompt_tokens + run.output_tokens == 0:
        reasons.append("no token was counted inside the window")
    if run.arrivals not in PREDICTED_ARRIVALS and expected is None:
        why = (
            "a simulation of them is itself the prediction"
            if run.simulated
            else "the plan does not hold the profile to simulate them on; profile and solve again"
        )
        reasons.append(f"no prediction for open-loop arrivals ({run.arrivals}): {why}")
    elif expected is None:
        known = ", ".join(str(entry.concurrency) for entry in run.plan.predicted.expected) or "no concurrency"
        reasons.append(
            f"no prediction for concurrency {run.concurrency}; the plan has {known}: "
            f"solve again with --concurrency {run.concurrency}"
        )
    reasons += [f"the record contradicts itself: {check.message}" for check in checks if not check.is_passed]
    return tuple(reasons)


def _why_unsound(run: RunLog) -> str:
    """Empty unless too many emulated iterations took longer here than on their devices."""
    if run.late_share <= MAX_LATE_SHARE:
        return ""
    return (
        f"{run.late_share:.1%} of the emulated iterations took longer here than on their devices, and at most "
        f"{MAX_LATE_SHARE:.0%} may: raise `time_scale` in the testbed file, which was {run.time_scale:g}, then profile "
        "and run again"
    )


def _ratio(value: float | None, to: float | None) -> float | None:
    return None if value is None or not to else value / to


def _outcome(to_expected: float | None, to_bound: float | None, latencies: tuple[Latency, ...], band: Band) -> Outcome:
    if to_expected is None or to_bound is None:
        return Outcome.NOT_MEASURED
    if to_bound > band.max_bound_ratio:
        return Outcome.ABOVE_BOUND
    if to_expected < band.min_ratio or _late(latencies, band):
        return Outcome.BELOW_EXPECTED
    return Outcome.ABOVE_EXPECTED if to_expected > band.max_ratio else Outcome.AS_PREDICTED


def _late(latencies: tuple[Latency, ...], band: Band) -> list[str]:
    """Percentiles of latency that are above what was promised by more than the band allows."""
    return [
        f"{latency.kind.upper()} p{percent} is {ratio:.3f} x promised"
        for latency in latencies
        for percent, ratio in latency.ratios.items()
        if ratio > band.max_latency_ratio
    ]


def _statement(
    run: RunLog,
    outcome: Outcome,
    to_expected: float | None,
    to_bound: float | None,
    latencies: tuple[Latency, ...],
    band: Band,
    reasons: tuple[str, ...],
) -> str:
    if outcome is Outcome.UNSOUND:
        return f"Unsound: {'; '.join(reasons)}."
    if outcome is Outcome.NOT_MEASURED or to_expected is None or to_bound is None:
        what = "Could not measure (a simulated run): " if run.simulated else "Could not measure: "
        return what + ("; ".join(reasons) or "the plan's max-flow is 0") + "."
    verb = "simulated" if run.simulated else "measured on emulated devices" if run.emulated else "measured"
    result = f"{verb} {run.total_tokens_per_s:,.4g} tokens/s = {to_expected:.3f} x expected, {to_bound:.3f} x bound"
    within = f"{band.min_ratio:g} .. {band.max_ratio:g}"
    if outcome is Outcome.BELOW_EXPECTED and (late := _late(latencies, band)):
        return f"Below expected: {result}; {'; '.join(late)}, and at most {band.max_latency_ratio:g} is accepted."
    return {
        Outcome.AS_PREDICTED: f"As predicted: {result}; the ratio to expected is within {within}.",
        Outcome.BELOW_EXPECTED: f"Below expected: {result}; the ratio to expected must be at least {band.min_ratio:g}.",
        Outcome.ABOVE_EXPECTED: f"Above expected: {result}; beyond {band.max_ratio:g} the prediction is too low.",
        Outcome.ABOVE_BOUND: f"Above the bound: {result}. No run can exceed it: the cost model or a unit is wrong.",
    }[outcome]


def _expected_interval(expected: Expected | None) -> Interval | None:
    if expected is None or expected.low_total_tokens_per_s is None or expected.high_total_tokens_per_s is None:
        return None
    return Interval(expected.low_total_tokens_per_s, expected.high_total_tokens_per_s)


def _node_residuals(run: RunLog, expected: Expected | None) -> tuple[NodeResidual, ...]:
    """Nodes in the order of their layers, the coordinator last.

    A node's share is relative to the tokens that entered the model, as counted by the nodes that hold layer 0. Both
    sides are then counters of nodes, so tokens in flight at the edges of the window hardly matter.
    """
    placement = run.plan.placement
    first = [name for name, held in placement.items() if held.start == 0 and name in run.nodes]
    entered = sum(_node_tokens(run.nodes[name]) for name in first)
    names = sorted(placement, key=lambda name: (placement[name], name))
    return tuple(_node_residual(run, name, expected, entered) for name in (*names, COORDINATOR) if name in run.nodes)


def _node_residual(run: RunLog, name: str, expected: Expected | None, entered: int) -> NodeResidual:
    use, flow = run.nodes[name], run.plan.nodes.get(name)
    planned = _ratio(flow.flow_tokens_per_s if flow else None, run.plan.predicted.max_flow_tokens_per_s)
    if expected is not None:
        planned = expected.node_share.get(name, planned)
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
    """Predicted busy time over the predicted number of iterations.

    A node decodes its share of the output tokens, ``batch`` of them per iteration. The first output token of a request
    comes from its prefill, so it is not decoded.
    """
    if expected is None or share is None or busy is None or batch is None:
        return None
    mean_output = run.plan.assumptions.workload.mean_output_tokens
    decoded_per_s = expected.output_tokens_per_s * (mean_output - 1) / mean_output
    return _ratio(busy * batch, share * decoded_per_s)


def _link_residuals(run: RunLog, expected: Expected | None) -> tuple[LinkResidual, ...]:
    """Planned links in the plan's order, then unplanned links that carried tokens."""
    planned = {(flow.src, flow.dst): flow for flow in run.plan.flows}
    used = {(use.src, use.dst): use for use in run.links}
    return tuple(
        _link_residual(run, expected, src, dst, planned.get((src, dst)), used.get((src, dst)))
        for src, dst in {**planned, **used}
        if (src, dst) in planned or used[(src, dst)].tokens  # others carried control messages only
    )


def _link_residual(
    run: RunLog, expected: Expected | None, src: str, dst: str, flow: LinkFlow | None, use: LinkUse | None
) -> LinkResidual:
    """Shares are of the tokens that leave the coordinator, on links to it of those that return: each sums to one."""
    is_return = dst == COORDINATOR
    total = sum(other.tokens for other in run.links if (other.dst if is_return else other.src) == COORDINATOR)
    planned = _ratio(flow.flow_tokens_per_s if flow else 0.0, run.plan.predicted.max_flow_tokens_per_s) or 0.0
    if expected is not None and expected.link_share:
        planned = expected.link_share.get(src, {}).get(dst, 0.0)
    return LinkResidual(
        src=src,
        dst=dst,
        planned_share=planned,
        realised_share=_ratio(use.tokens if use else 0, total) or 0.0,
        measured_bytes_per_s=(use.payload_bytes if use else 0) / run.window.seconds,
    )
