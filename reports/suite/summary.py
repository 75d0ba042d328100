"""Summary of a suite: the cases, then predicted and measured values of nodes, links and latencies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from helixbench.reports.formatting import number, ratio, signed_percent
from helixbench.reports.render.document import BAD, BOLD, CAUTION, GOOD, Document, Row, Section, Styled, section
from helixbench.reports.render.summaries import LINK_COLUMNS, NODE_ABOUT, NODE_COLUMNS, link_row, node_row
from helixbench.reports.suite.result import CaseOutcome, CaseResult, SuiteResult
from helixbench.reports.verdict.causes import relative
from helixbench.reports.verdict.verdict import Interval

_STYLE = {
    CaseOutcome.OK: GOOD,
    CaseOutcome.OFF: BAD,
    CaseOutcome.INCONCLUSIVE: CAUTION,
    CaseOutcome.NOT_MEASURED: CAUTION,
}
# Links whose share is nearer to the plan are not listed.
_NOTABLE_SHARE = 0.005
_MAX_CAUSES = 3
_CASES = ("case", ">bound", ">expected", ">measured", ">ratio", ">TPOT", ">TTFT", "verdict")
_LATENCIES = ("", ">p50 s", ">off", ">p90 s", ">off", ">p99 s", ">off")


def suite_summary(result: SuiteResult) -> Document:
    """All tables of a suite; measured values are medians over the repeats."""
    num_ok = sum(case.outcome is CaseOutcome.OK for case in result.cases)
    tolerance, band = result.tolerance, result.tolerance.band
    return Document(
        kind="suite",
        title=f"{result.suite}: {num_ok} of {len(result.cases)} cases ok{', interrupted' * result.is_interrupted}",
        lines=(
            f"median of {result.repeats} repeats; accepted: ratio {band.min_ratio:g} .. {band.max_ratio:g}, "
            f"TPOT within {tolerance.tpot:.0%}",
        ),
        sections=(
            section(
                "Cases",
                "total tokens/s; ratio, TPOT and TTFT (p50): measured / expected",
                _CASES,
                map(_case_row, result.cases),
                is_detail=False,
            ),
            Section(title="Findings", lines=tuple(_findings(result)), is_detail=False),
            _by_case("Nodes", NODE_ABOUT, NODE_COLUMNS, result, lambda case: map(node_row, case.nodes)),
            _by_case("Links", "share of the tokens, where not as planned", LINK_COLUMNS, result, _link_rows),
            _by_case(
                "Latency",
                "predicted / measured; p50 by the plan, p90 and p99 simulated",
                _LATENCIES,
                result,
                _latencies,
            ),
        ),
        notes=tuple(f"testbed {name}: {how}" for name, how in result.testbeds.items() if how),
        provenance=result.provenance,
    )


def _findings(result: SuiteResult) -> Iterator[str]:
    """For each case that is not ok its statement and likely causes; for every case a stale profile."""
    for case in result.cases:
        yield from (f"{case.name}: stale profile: {line}" for line in case.stale)
        if case.outcome is not CaseOutcome.OK:
            yield f"{case.name}: {case.statement}"
            yield from (f"{case.name}: {cause}" for cause in case.causes[:_MAX_CAUSES])


def _case_row(case: CaseResult) -> Row:
    return (
        case.name,
        number(case.bound_tokens_per_s),
        _with_half_width(case.expected_tokens_per_s, case.expected_interval),
        _with_half_width(case.measured_tokens_per_s, case.measured_interval),
        ratio(case.ratio),
        *("-" if value is None else f"{value:.2f}" for value in (case.tpot_ratio, case.ttft_ratio)),
        Styled(case.outcome, _STYLE[case.outcome]),
    )


def _with_half_width(value: float | None, interval: Interval | None) -> str:
    if value is None or interval is None:
        return number(value)
    return f"{number(value)} ±{number((interval.high - interval.low) / 2)}"


def _by_case(
    title: str,
    about: str,
    columns: Sequence[str],
    result: SuiteResult,
    rows_of: Callable[[CaseResult], Iterable[Row]],
) -> Section:
    """The rows of each case below its name; cases without rows are left out."""
    rows: list[Row] = []
    for case in result.cases:
        own = [(f"  {row[0]}", *row[1:]) for row in rows_of(case)]
        if own:
            rows += [(Styled(case.name, BOLD), *("" for _ in columns[1:])), *own]
    return section(title, about, columns, rows)


def _link_rows(case: CaseResult) -> Iterator[Row]:
    return (link_row(link) for link in case.links if abs(link.realised_share - link.planned_share) >= _NOTABLE_SHARE)


def _latencies(case: CaseResult) -> Iterator[Row]:
    simulated = {latency.kind: latency for latency in case.simulated}
    for found in case.latencies:
        predicted = simulated.get(found.kind)
        yield (
            found.kind.upper(),
            *_compared(found.predicted_mean_s, found.p50_s),
            *_compared(predicted.p90_s if predicted else None, found.p90_s),
            *_compared(predicted.p99_s if predicted else None, found.p99_s),
        )


def _compared(predicted: float | None, measured: float) -> tuple[str, str]:
    text = "-" if predicted is None else f"{predicted:.3g}"
    return f"{text} / {measured:.3g}", signed_percent(relative(measured, predicted))
