"""Judge a suite, in pure functions: the verdicts of a case's repeats give one result, results an exit code."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

import msgspec

from helixbench.reference_server.run_log import RunLog
from helixbench.reports.gate.cases import ExitCode
from helixbench.reports.suite.result import CaseOutcome, CaseResult, Tolerance
from helixbench.reports.verdict.intervals import mean_interval
from helixbench.reports.verdict.validate import latencies_of
from helixbench.reports.verdict.verdict import Verdict

StructT = TypeVar("StructT", bound=msgspec.Struct)


def judge_case(
    case: CaseResult,
    verdicts: Sequence[Verdict],
    *,
    tolerance: Tolerance,
    failures: Sequence[str] = (),
    simulated: RunLog | None = None,
) -> CaseResult:
    """Complete the result of a case from its repeats.

    Args:
        case: names the case and the number of repeats that were asked for.
        verdicts: one for each repeat that left a run log, all of one plan.
        tolerance: what counts as ok.
        failures: why steps of this case failed.
        simulated: its simulated plan, which predicts the percentiles that the plan does not.
    """
    measured = [verdict for verdict in verdicts if verdict.outcome.is_comparison]
    reasons = tuple(dict.fromkeys((*failures, *(reason for verdict in verdicts for reason in verdict.reasons))))
    if not measured:
        statement = "no repeat could be measured" + (f": {reasons[0]}" if reasons else "")
        return msgspec.structs.replace(case, statement=statement, reasons=reasons)
    first = measured[0]
    ratios = tuple(verdict.ratio_to_expected for verdict in measured if verdict.ratio_to_expected is not None)
    totals = [verdict.measured_tokens_per_s for verdict in measured if verdict.measured_tokens_per_s is not None]
    tpots, ttfts = _p50_ratios(measured, "tpot"), _p50_ratios(measured, "ttft")
    to_bound = statistics.median(totals) / first.bound_tokens_per_s
    outcome, statement = _outcome(ratios, tpots, to_bound=to_bound, tolerance=tolerance)
    missing = "" if len(measured) == case.asked_repeats else f"; {len(measured)} of {case.asked_repeats} repeats"
    return msgspec.structs.replace(
        case,
        outcome=outcome,
        statement=statement + missing,
        num_repeats=len(measured),
        reasons=reasons,
        causes=_median_verdict(measured).causes,
        stale=tuple(dict.fromkeys(line for verdict in measured for line in verdict.stale)),
        bound_tokens_per_s=first.bound_tokens_per_s,
        expected_tokens_per_s=first.expected_tokens_per_s,
        expected_interval=first.expected_interval,
        measured_tokens_per_s=statistics.median(totals),
        measured_interval=mean_interval(totals),
        ratios=ratios,
        ratio=statistics.median(ratios),
        spread=max(ratios) - min(ratios),
        tpot_ratios=tpots,
        tpot_ratio=statistics.median(tpots) if tpots else None,
        ttft_ratio=statistics.median(ttfts) if ttfts else None,
        nodes=_medians(measured, lambda verdict: verdict.nodes, lambda node: node.name),
        links=_medians(measured, lambda verdict: verdict.links, lambda link: (link.src, link.dst)),
        latencies=_medians(measured, lambda verdict: verdict.latencies, lambda latency: latency.kind),
        simulated=() if simulated is None else latencies_of(simulated, None),
    )


def judge_ratios(values: Sequence[float], *, low: float, high: float) -> CaseOutcome:
    """Whether the median of the repeats lies in ``[low, high]``, and whether they are enough to tell.

    The range of five repeats contains the median with 94 % confidence (order statistics). If that range is wider than
    the tolerance the median decides nothing, unless all of the range is on one side outside. A single repeat has no
    range.
    """
    if not values:
        return CaseOutcome.NOT_MEASURED
    if len(values) < 2:
        return CaseOutcome.INCONCLUSIVE
    if max(values) < low or min(values) > high:
        return CaseOutcome.OFF
    if max(values) - min(values) > high - low:
        return CaseOutcome.INCONCLUSIVE
    return CaseOutcome.OK if low <= statistics.median(values) <= high else CaseOutcome.OFF


def exit_code_of(cases: Sequence[CaseResult], *, is_strict: bool) -> ExitCode:
    """A case that is off fails; else a missing repeat; else, with ``is_strict``, an inconclusive case."""
    outcomes = {case.outcome for case in cases}
    if CaseOutcome.OFF in outcomes:
        return ExitCode.FAIL
    if any(case.num_repeats < case.asked_repeats for case in cases):
        return ExitCode.NOT_MEASURED
    return ExitCode.UNDECIDED if is_strict and CaseOutcome.INCONCLUSIVE in outcomes else ExitCode.PASS


def _outcome(
    ratios: Sequence[float], tpots: Sequence[float], *, to_bound: float, tolerance: Tolerance
) -> tuple[CaseOutcome, str]:
    band = tolerance.band
    outcomes = [judge_ratios(ratios, low=band.min_ratio, high=band.max_ratio)]
    parts = [_described("total tokens/s", outcomes[0], ratios)]
    if tpots:
        outcomes.append(judge_ratios(tpots, low=1 - tolerance.tpot, high=1 + tolerance.tpot))
        parts.append(_described("TPOT p50", outcomes[1], tpots))
    else:
        parts.append("no TPOT: outputs of one token, or no prediction")
    if to_bound > band.max_bound_ratio:
        parts.insert(0, f"above the bound ({to_bound:.3f} x): the cost model or a unit is wrong")
        return CaseOutcome.OFF, "; ".join(parts)
    worst = (outcome for outcome in (CaseOutcome.OFF, CaseOutcome.INCONCLUSIVE) if outcome in outcomes)
    return next(worst, CaseOutcome.OK), "; ".join(parts)


def _described(what: str, outcome: CaseOutcome, values: Sequence[float]) -> str:
    text = f"{what} {outcome}: {statistics.median(values):.3f} x expected"
    return f"{text}, one repeat" if len(values) < 2 else f"{text} ({min(values):.3f} .. {max(values):.3f})"


def _p50_ratios(verdicts: Iterable[Verdict], kind: Literal["ttft", "tpot"]) -> tuple[float, ...]:
    found = (latency for verdict in verdicts for latency in verdict.latencies if latency.kind == kind)
    pairs = (
        (latency.p50_s, latency.promised.p50_s if latency.promised else latency.predicted_mean_s) for latency in found
    )
    return tuple(measured / predicted for measured, predicted in pairs if predicted)


def _medians(
    verdicts: Iterable[Verdict], parts: Callable[[Verdict], Iterable[StructT]], key: Callable[[StructT], object]
) -> tuple[StructT, ...]:
    """The parts of all verdicts with equal key merged into one, in the order in which keys first occur."""
    found: dict[object, list[StructT]] = {}
    for verdict in verdicts:
        for part in parts(verdict):
            found.setdefault(key(part), []).append(part)
    return tuple(_median_part(group) for group in found.values())


def _median_part(group: Sequence[StructT]) -> StructT:
    """Field by field the median of the numbers; names and predictions are the same in all repeats."""
    medians: dict[str, float] = {}
    for field in group[0].__struct_fields__:
        values = [value for part in group if isinstance(value := getattr(part, field), int | float)]
        if values:
            is_count = all(isinstance(value, int) for value in values)
            medians[field] = statistics.median_low(values) if is_count else statistics.median(values)
    return msgspec.structs.replace(group[0], **medians)


def _median_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """The one with the median ratio, of an even number the lower one."""
    return sorted(verdicts, key=lambda verdict: verdict.ratio_to_expected or 0.0)[(len(verdicts) - 1) // 2]
