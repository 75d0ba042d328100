"""The table of a suite, on the terminal in 80 columns and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from rich.console import Group, RenderableType
from rich.text import Text

from helixbench.reports.render import markdown
from helixbench.reports.render import terminal_blocks as parts
from helixbench.reports.render.text import bit_rate, link_name, number, percent, points, ratio, signed_percent
from helixbench.reports.suite.result import CaseOutcome, CaseResult, LatencyBias, LinkBias, NodeBias, SuiteResult
from helixbench.reports.verdict.verdict import Interval

_STYLE: dict[CaseOutcome, str] = {
    "ok": "bold green",
    "off": "bold red",
    "inconclusive": "bold yellow",
    "not measured": "bold yellow",
}
_NOTABLE_POINTS = 0.005  # of share: a link that is nearer to its plan is not listed
_MAX_CAUSES = 3  # of a case; the largest stand first
_CASES = ("case", ">bound", ">expected", ">measured", ">ratio", ">TPOT", ">TTFT", "=verdict")
_NODES = ("", ">layers", ">busy %", ">off", ">batch", ">off", ">iteration ms", ">off")
_LINKS = ("", ">planned", ">measured", ">off", ">payload")
_LATENCIES = ("", ">p50 s", ">off", ">p90 s", ">off", ">p99 s", ">off")
_LATENCY_ABOUT = "predicted / measured; p50 by the plan, the others by simulation"
Rows: TypeAlias = dict[str, list[tuple[str, ...]]]


def suite_table(result: SuiteResult) -> RenderableType:
    """The cases, then how far off each node, link and latency was, predicted / measured, medians over the repeats."""
    return Group(
        Text.assemble(("SUITE", "bold"), f"  {result.suite}: {_about(result)}"),
        parts.block(
            "CASES",
            "total tokens/s; ratio, TPOT and TTFT (p50): measured / expected",
            parts.table(*_CASES, rows=[_styled(case) for case in result.cases]),
        ),
        parts.facts("WHY", _why(result)),
        _block("NODES", "predicted / measured; off: measured / predicted - 1", _NODES, _node_rows(result)),
        _block("LINKS", "share of the tokens, where it is not as planned", _LINKS, _link_rows(result)),
        _block(
            "LATENCY",
            _LATENCY_ABOUT,
            _LATENCIES,
            _latency_rows(result),
        ),
        parts.facts("TESTBEDS", [f"{name}: {how}" for name, how in result.testbeds.items() if how]),
    )


def suite_markdown(result: SuiteResult) -> str:
    """The same as Markdown: the cases first, the rest folded away."""
    count = sum(case.outcome == "ok" for case in result.cases)
    sections = (
        ("Nodes, predicted / measured", _NODES, _node_rows(result)),
        ("Links, share of the tokens, where it is not as planned", _LINKS, _link_rows(result)),
        (f"Latency, {_LATENCY_ABOUT}", _LATENCIES, _latency_rows(result)),
    )
    return markdown.fit(
        [
            f"### helixbench validate: {count} of {len(result.cases)} cases ok",
            markdown.escape(f"{result.suite}: {_about(result)}"),
            markdown.table(_plain(_CASES), [_case_row(case) for case in result.cases]),
            markdown.bullets(_why(result)),
            *(
                markdown.folded(title, markdown.table(columns, _lines(columns, rows)))
                for title, columns, rows in sections
            ),
            markdown.bullets(f"{name}: {how}" for name, how in result.testbeds.items() if how),
        ]
    )


def _about(result: SuiteResult) -> str:
    tolerance = result.tolerance
    return (
        f"median of {result.repeats} repeats, ratio within [{tolerance.min_ratio:g}, {tolerance.max_ratio:g}], "
        f"TPOT within {tolerance.tpot:.0%}{'; interrupted' if result.is_interrupted else ''}"
    )


def _why(result: SuiteResult) -> Iterator[str]:
    """Of each case that is not ok: how far off it was, and what points to the cause; of all, a stale profile."""
    for case in result.cases:
        yield from (f"{case.name}: {note}" for note in case.stale)
        if case.outcome != "ok":
            yield f"{case.name}: {case.statement}"
            yield from (f"{case.name}: {cause}" for cause in case.causes[:_MAX_CAUSES])


def _case_row(case: CaseResult) -> tuple[str, ...]:
    return (
        case.name,
        number(case.bound_tokens_per_s),
        _with_half_width(case.expected_tokens_per_s, case.expected_interval),
        _with_half_width(case.measured_tokens_per_s, case.measured_interval),
        ratio(case.ratio),
        *(_two_digits(value) for value in (case.tpot_ratio, case.ttft_ratio)),
        case.outcome,
    )


def _styled(case: CaseResult) -> tuple[RenderableType, ...]:
    return (*_case_row(case)[:-1], Text(case.outcome, style=_STYLE[case.outcome]))


def _with_half_width(value: float | None, interval: Interval | None) -> str:
    if value is None or interval is None:
        return number(value)
    return f"{number(value)} ±{number((interval.high - interval.low) / 2)}"


def _two_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _node_rows(result: SuiteResult) -> Rows:
    return {case.name: [_node_row(node) for node in case.nodes] for case in result.cases}


def _node_row(node: NodeBias) -> tuple[str, ...]:
    return (
        node.name,
        "" if node.layers is None else str(node.layers),
        f"{_times(node.predicted_busy, 100)}/{_times(node.measured_busy, 100)}",
        signed_percent(node.busy_bias),
        f"{_times(node.predicted_batch_tokens, 1)}/{_times(node.measured_batch_tokens, 1)}",
        signed_percent(node.batch_bias),
        f"{_times(node.predicted_iteration_s, 1e3)}/{_times(node.measured_iteration_s, 1e3)}",
        signed_percent(node.iteration_bias),
    )


def _link_rows(result: SuiteResult) -> Rows:
    return {
        case.name: [_link_row(link) for link in case.links if abs(link.share_bias) >= _NOTABLE_POINTS]
        for case in result.cases
    }


def _link_row(link: LinkBias) -> tuple[str, ...]:
    return (
        link_name(link.src, link.dst),
        percent(link.planned_share, 1),
        percent(link.realised_share, 1),
        points(link.share_bias),
        bit_rate(link.measured_bytes_per_s),
    )


def _latency_rows(result: SuiteResult) -> Rows:
    return {case.name: [_latency_row(latency) for latency in case.latencies] for case in result.cases}


def _latency_row(latency: LatencyBias) -> tuple[str, ...]:
    return (
        latency.kind.upper(),
        f"{_times(latency.predicted_p50_s, 1)}/{_times(latency.p50_s, 1)}",
        signed_percent(latency.p50_bias),
        f"{_times(latency.predicted_p90_s, 1)}/{_times(latency.p90_s, 1)}",
        signed_percent(latency.p90_bias),
        f"{_times(latency.predicted_p99_s, 1)}/{_times(latency.p99_s, 1)}",
        signed_percent(latency.p99_bias),
    )


def _times(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{value * factor:.3g}"


def _block(title: str, about: str, columns: Sequence[str], rows: Rows) -> RenderableType:
    """Each case's rows under its name; cases without rows are left out, and so is a block without any."""
    lines: list[Sequence[RenderableType]] = [
        (Text(line[0], style="bold"), *line[1:]) if line[0] in rows else line for line in _lines(columns, rows)
    ]
    return parts.block(title, about, parts.table(*columns, rows=lines)) if lines else Text("", end="")


def _lines(columns: Sequence[str], rows: Rows) -> Iterator[tuple[str, ...]]:
    for case, own in rows.items():
        if own:
            yield (case, *("" for _ in columns[1:]))
            yield from ((f"  {row[0]}", *row[1:]) for row in own)


def _plain(columns: Sequence[str]) -> list[str]:
    return [column.removeprefix("=") for column in columns]
