"""Summaries of comparisons and of regression gates."""

from __future__ import annotations

from collections.abc import Sequence

from helixbench.reports.compare.change import Change, Comparison, Judgement
from helixbench.reports.compare.regression import Answer, Pair, Regression
from helixbench.reports.formatting import interval, metric_name, number, ratio
from helixbench.reports.render.document import BAD, BOLD, CAUTION, GOOD, Document, Row, Section, Styled, section

_JUDGEMENT_STYLE = {Judgement.WORSE: BAD, Judgement.BETTER: GOOD, Judgement.CHANGED: BOLD}
_ANSWER_STYLE = {
    Answer.FASTER: GOOD,
    Answer.SAME: GOOD,
    Answer.SLOWER: BAD,
    Answer.INCONCLUSIVE: CAUTION,
    Answer.NO_DATA: CAUTION,
}
MAX_CHANGES = 40


def comparison_summary(comparison: Comparison) -> Document:
    """All changes, the worst first; unchanged quantities are counted."""
    changes = comparison.changed()
    same = len(comparison.changes) - len(changes)
    return Document(
        kind="comparison",
        title=comparison.headline,
        lines=(f"base {comparison.base}, new {comparison.new}",),
        sections=(
            section(
                "Changes",
                "new / base with 95 % intervals",
                ("", "what", "base", "new", ">ratio", ">interval"),
                map(_change_row, changes),
                most=MAX_CHANGES,
                lines=[f"{same} unchanged"] if same else [],
                is_detail=False,
            ),
        ),
        notes=comparison.notes,
    )


def regression_summary(regression: Regression) -> Document:
    """The pairs, the ratio with its interval, and the answer."""
    question = regression.question
    better = "higher is better" if question.is_higher_better else "lower is better"
    return Document(
        kind="gate",
        title=f"{question.metric}, {better}; smallest effect that matters {question.min_effect:.1%}",
        sections=(
            _pairs("Pairs", "one fresh process of each side, in turn", regression.pairs),
            _pairs("Confirmation", "fresh pairs after a first SLOWER", regression.confirmation),
        ),
        verdict=Styled(regression.answer, _ANSWER_STYLE[regression.answer]),
        statement=regression.statement,
        notes=regression.notes,
    )


def _change_row(change: Change) -> Row:
    span = change.interval
    judgement = "noise" if change.judgement is Judgement.WITHIN_NOISE else change.judgement
    return (
        Styled(judgement, _JUDGEMENT_STYLE.get(change.judgement, "italic")),
        metric_name(change.name),
        change.base,
        change.new,
        ratio(change.ratio) if change.ratio is not None else "",
        interval(span) if span and span.low != span.high else "",
    )


def _pairs(title: str, about: str, pairs: Sequence[Pair]) -> Section:
    rows = (
        (str(i), number(pair.base), number(pair.new), ratio(pair.new / pair.base) if pair.base else "-")
        for i, pair in enumerate(pairs, start=1)
    )
    return section(title, about, (">", ">base", ">new", ">new / base"), rows)
