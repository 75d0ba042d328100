"""Comparisons and regression gates on the terminal, in the same visual language as the summaries."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from helixbench.reports.compare.changes import Change, Judgement
from helixbench.reports.compare.compare import Comparison
from helixbench.reports.compare.regression import Answer, Pair, Regression
from helixbench.reports.render import terminal_blocks as parts
from helixbench.reports.render.text import interval, number, ratio

# What matters most is listed first; what was judged comes before what has no known noise.
_ORDER: dict[Judgement, int] = {"worse": 0, "better": 1, "within noise": 2, "changed": 3, "unchanged": 4}
_STYLE: dict[Judgement, str] = {"worse": "bold red", "better": "bold green", "changed": "bold"}
_ANSWER_STYLE: dict[Answer, str] = {
    "FASTER": "bold green",
    "SAME": "bold green",
    "SLOWER": "bold red",
    "INCONCLUSIVE": "bold yellow",
    "NO DATA": "bold yellow",
}


def comparison_summary(comparison: Comparison) -> RenderableType:
    """What changed, worst first; what did not change is counted."""
    changes = changes_in_order(comparison)
    same = len(comparison.changes) - len(changes)
    rows: list[tuple[RenderableType, ...]] = []
    for judgement, group in itertools.groupby(changes, key=lambda change: change.judgement):
        rows.append((Text(judgement, style=_STYLE.get(judgement, "italic")), "", "", "", ""))
        rows += [_row(change) for change in group]
    about = f"two {comparison.kind}s: base {comparison.base}, new {comparison.new}"
    return Group(
        Text.assemble(("COMPARISON", "bold"), "  ", about),
        parts.facts("MIND", comparison.notes),
        parts.block(
            "CHANGES",
            "new / base with 95 % intervals",
            parts.table("", "base", "new", ">ratio", "=interval", rows=rows),
        )
        if rows
        else Text("\n  nothing changed"),
        *([Text(f"  {same} more did not change")] if same and rows else []),
    )


def _row(change: Change) -> tuple[str, ...]:
    span = change.interval
    return (
        f"  {change.name}",
        change.base,
        change.new,
        ratio(change.ratio) if change.ratio is not None else "",
        interval(span) if span and span.low != span.high else "",
    )


def changes_in_order(comparison: Comparison) -> list[Change]:
    """What changed, worst first, then in the order of the comparison."""
    changed = [change for change in comparison.changes if change.judgement != "unchanged"]
    return sorted(changed, key=lambda change: _ORDER[change.judgement])


def regression_summary(regression: Regression) -> RenderableType:
    """The pairs, the ratio with its interval, and the answer."""
    question = regression.question
    better = "higher is better" if question.is_higher_better else "lower is better"
    return Group(
        Text.assemble(("GATE", "bold"), f"  {question.metric}, {better}; least effect {question.min_effect:.1%}"),
        parts.block("PAIRS", "fresh processes, run in turn", _pair_table(regression.pairs)),
        *(
            [parts.block("CONFIRMATION", "fresh pairs after a first SLOWER", _pair_table(regression.confirmation))]
            if regression.confirmation
            else []
        ),
        parts.facts("MIND", regression.notes),
        parts.block("VERDICT", Text(regression.answer, style=_ANSWER_STYLE[regression.answer]), regression.statement),
    )


def _pair_table(pairs: Sequence[Pair]) -> RenderableType:
    rows = [
        (str(i), number(pair.base), number(pair.new), ratio(pair.new / pair.base) if pair.base else "-")
        for i, pair in enumerate(pairs, start=1)
    ]
    return parts.table(">", ">base", ">new", ">new / base", rows=rows)
