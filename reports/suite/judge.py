"""Judge a suite, in pure functions: the verdicts of a case's repeats to one result, results to an exit code."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

import msgspec

from helixbench.reference_server.run_log import RunLog
from helixbench.reports.gate.gate import COULD_NOT_MEASURE, FAIL, PASS
from helixbench.reports.suite.result import CaseOutcome, CaseResult, LatencyBias, LinkBias, NodeBias, Tolerance
from helixbench.reports.verdict.causes import relative
from helixbench.reports.verdict.intervals import mean_interval
from helixbench.reports.verdict.verdict import STALE_NOTE, Band, Latency, LinkResidual, NodeResidual, Verdict

INCONCLUSIVE = 4
ItemT = TypeVar("ItemT")


def judge_case(
    name: str,
    verdicts: Sequence[Verdict],
    *,
    testbed: str,
    workload: str,
    concurrency: int | None,
    repeats: int,
    tolerance: Tolerance,
    failures: Sequence[str] = (),
    simulated: RunLog | None = None,
) -> CaseResult:
    """Hold the repeats of one case against its plan.

    Args:
        name: of the case.
        verdicts: one for each repeat that left a run log, all of one plan.
        testbed: its name.
        workload: where its lengths come from.
        concurrency: requests in flight; ``None`` where no plan says.
        repeats: how many were asked for.
        tolerance: what counts as ok.
        failures: why steps of this case failed.
        simulated: its plan on a virtual clock, which predicts the percentiles that the plan does not.
    """
    measured = [verdict for verdict in verdicts if verdict.ratio_to_expected is not None and not verdict.reasons]
    reasons = (*failures, *(reason for verdict in verdicts for reason in verdict.reasons))
    base = CaseResult(
        name=name,
        testbed=testbed,
        workload=workload,
        concurrency=concurrency,
        outcome="not measured",
        statement="no repeat could be measured" + (f": {reasons[0]}" if reasons else ""),
        asked_repeats=repeats,
        num_repeats=len(measured),
        reasons=tuple(dict.fromkeys(reasons)),
    )
    if not measured:
        return base
    first = measured[0]
    ratios = tuple(verdict.ratio_to_expected for verdict in measured if verdict.ratio_to_expected is not None)
    totals = [verdict.measured_tokens_per_s for verdict in measured if verdict.measured_tokens_per_s is not None]
    tpots, ttfts = _p50_ratios(measured, "tpot"), _p50_ratios(measured, "ttft")
    outcome, statement = _outcome(
        ratios, tpots, to_bound=statistics.median(totals) / first.bound_tokens_per_s, tolerance=tolerance
    )
    return msgspec.structs.replace(
        base,
        outcome=outcome,
        statement=statement + ("" if len(measured) == repeats else f"; {len(measured)} of {repeats} repeats"),
        causes=_median_verdict(measured).causes,
        stale=_stale(measured),
        bound_tokens_per_s=first.bound_tokens_per_s,
        expected_tokens_per_s=first.expected_tokens_per_s,
        expected_interval=first.expected_interval,
        measured_tokens_per_s=statistics.median(totals),
        measured_interval=mean_interval(totals),
        ratios=ratios,
        ratio=statistics.median(ratios),
        spread=max(ratios) - min(ratios),
        tpot_ratios=tpots,
        tpot_ratio=_median(tpots),
        ttft_ratio=_median(ttfts),
        nodes=tuple(_node_bias(nodes) for nodes in _by_key(measured, lambda v: v.nodes, lambda node: node.name)),
        links=tuple(_link_bias(links) for links in _by_key(measured, lambda v: v.links, lambda k: (k.src, k.dst))),
        latencies=tuple(
            _latency_bias(found, simulated) for found in _by_key(measured, lambda v: v.latencies, lambda k: k.kind)
        ),
    )


def judge_ratios(values: Sequence[float], *, low: float, high: float) -> CaseOutcome:
    """Whether the median of the repeats lies in ``[low, high]``, and whether they say so.

    With five repeats the span from the least to the largest is a 94 % interval of the median (order statistics). Where
    it is wider than the tolerance the median decides nothing, unless all of it lies on one side of the tolerance. One
    repeat says nothing of the spread.
    """
    if not values:
        return "not measured"
    if len(values) < 2:
        return "inconclusive"
    if max(values) < low or min(values) > high:
        return "off"
    if max(values) - min(values) > high - low:
        return "inconclusive"
    return "ok" if low <= statistics.median(values) <= high else "off"


def exit_code_of(cases: Sequence[CaseResult], *, is_strict: bool) -> int:
    """1 where a case is off, else 3 where a repeat is missing, else 4 (strict) where one is inconclusive, else 0."""
    if any(case.outcome == "off" for case in cases):
        return FAIL
    if any(case.num_repeats < case.asked_repeats for case in cases):
        return COULD_NOT_MEASURE
    if is_strict and any(case.outcome == "inconclusive" for case in cases):
        return INCONCLUSIVE
    return PASS


def _outcome(
    ratios: Sequence[float], tpots: Sequence[float], *, to_bound: float, tolerance: Tolerance
) -> tuple[CaseOutcome, str]:
    total = judge_ratios(ratios, low=tolerance.min_ratio, high=tolerance.max_ratio)
    said = [_said("total tokens/s", total, ratios)]
    outcomes: list[CaseOutcome] = [total]
    if tpots:
        outcomes.append(judge_ratios(tpots, low=1 - tolerance.tpot, high=1 + tolerance.tpot))
        said.append(_said("TPOT p50", outcomes[-1], tpots))
    else:
        said.append("no TPOT: outputs of one token, or none predicted")
    if to_bound > Band().max_bound_ratio:
        return "off", f"above the bound ({to_bound:.3f} x): an error in the model or the units; {'; '.join(said)}"
    order: tuple[CaseOutcome, ...] = ("off", "inconclusive")
    return next((worst for worst in order if worst in outcomes), "ok"), "; ".join(said)


def _said(what: str, outcome: CaseOutcome, values: Sequence[float]) -> str:
    text = f"{what} {outcome}: {statistics.median(values):.3f} x expected"
    if len(values) < 2:
        return f"{text}, one repeat"
    return f"{text} ({min(values):.3f} .. {max(values):.3f})"


def _p50_ratios(verdicts: Iterable[Verdict], kind: Literal["ttft", "tpot"]) -> tuple[float, ...]:
    found = (latency for verdict in verdicts for latency in verdict.latencies if latency.kind == kind)
    return tuple(latency.p50_s / latency.predicted_mean_s for latency in found if latency.predicted_mean_s)


def _by_key(
    verdicts: Iterable[Verdict],
    parts: Callable[[Verdict], Iterable[ItemT]],
    key: Callable[[ItemT], object],
) -> list[list[ItemT]]:
    """The parts of all verdicts, those with one key together, in the order in which keys first come."""
    found: dict[object, list[ItemT]] = {}
    for verdict in verdicts:
        for part in parts(verdict):
            found.setdefault(key(part), []).append(part)
    return list(found.values())


def _node_bias(nodes: Sequence[NodeResidual]) -> NodeBias:
    first = nodes[0]
    busy = statistics.median(node.measured_busy for node in nodes)
    batch = _median(node.measured_batch_tokens for node in nodes)
    iteration_s = _median(node.measured_iteration_s for node in nodes)
    return NodeBias(
        name=first.name,
        layers=first.layers,
        predicted_busy=first.predicted_busy,
        measured_busy=busy,
        busy_bias=relative(busy, first.predicted_busy),
        predicted_batch_tokens=first.predicted_batch_tokens,
        measured_batch_tokens=batch,
        batch_bias=relative(batch, first.predicted_batch_tokens),
        predicted_iteration_s=first.predicted_iteration_s,
        measured_iteration_s=iteration_s,
        iteration_bias=relative(iteration_s, first.predicted_iteration_s),
    )


def _link_bias(links: Sequence[LinkResidual]) -> LinkBias:
    planned, realised = links[0].planned_share, statistics.median(link.realised_share for link in links)
    return LinkBias(
        src=links[0].src,
        dst=links[0].dst,
        planned_share=planned,
        realised_share=realised,
        share_bias=realised - planned,
        measured_bytes_per_s=statistics.median(link.measured_bytes_per_s for link in links),
    )


def _latency_bias(latencies: Sequence[Latency], simulated: RunLog | None) -> LatencyBias:
    kind, predicted_p50_s = latencies[0].kind, latencies[0].predicted_mean_s
    p50_s = statistics.median(one.p50_s for one in latencies)
    p90_s = statistics.median(one.p90_s for one in latencies)
    p99_s = statistics.median(one.p99_s for one in latencies)
    percentiles = None if simulated is None else simulated.latency_percentiles(kind, (90.0, 99.0))
    predicted_p90_s, predicted_p99_s = percentiles or (None, None)
    return LatencyBias(
        kind=kind,
        p50_s=p50_s,
        p90_s=p90_s,
        p99_s=p99_s,
        predicted_p50_s=predicted_p50_s,
        predicted_p90_s=predicted_p90_s,
        predicted_p99_s=predicted_p99_s,
        p50_bias=relative(p50_s, predicted_p50_s),
        p90_bias=relative(p90_s, predicted_p90_s),
        p99_bias=relative(p99_s, predicted_p99_s),
    )


def _stale(verdicts: Iterable[Verdict]) -> tuple[str, ...]:
    notes = (note for verdict in verdicts for note in verdict.notes if note.startswith(STALE_NOTE))
    return tuple(dict.fromkeys(notes))


def _median_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """The one with the median ratio; of an even number the lower one."""
    return sorted(verdicts, key=lambda verdict: verdict.ratio_to_expected or 0.0)[(len(verdicts) - 1) // 2]


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
