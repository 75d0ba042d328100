"""The regression gate: is NEW slower than BASE? Paired, direction-aware, with a least effect that matters.

Each pair is one fresh process of each side, run one after the other, so that what drifts (heat, neighbours, caches)
hits both. The interval is Student's t on the log ratios of the pairs; tests on the iterations inside one process take
what the process was dealt (addresses, hash seeds, neighbours) for an effect of the code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from helixbench.reports.verdict.intervals import CONFIDENCE, half_width, t_quantile
from helixbench.reports.verdict.verdict import Interval

Side = Literal["base", "new"]
Answer = Literal["FASTER", "SAME", "SLOWER", "INCONCLUSIVE", "NO DATA"]

MIN_PAIRS = 3
POWER = 0.8


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is asked of the pairs: which metric, which way is better, and how small a change does not matter.

    ``rounds`` pairs are run at first, more while undecided up to ``max_rounds``; SLOWER is confirmed by fresh pairs, as
    many again at most.
    """

    metric: str
    is_higher_better: bool
    min_effect: float = 0.05
    rounds: int = 6
    max_rounds: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.min_effect < 1:
            raise ValueError(f"min_effect: need a share between 0 and 1, got {self.min_effect}")
        if not MIN_PAIRS <= self.rounds <= self.max_rounds:
            raise ValueError(
                f"need {MIN_PAIRS} <= rounds <= max_rounds, got rounds {self.rounds} and max_rounds {self.max_rounds}"
            )


class Pair(msgspec.Struct, frozen=True, array_like=True):
    """The metric of one pair."""

    base: float
    new: float


class Regression(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.regression/1",
):
    """The answer. ``ratio`` is new / base, geometric mean over the pairs, with its 95 % interval.

    ``detectable_effect`` is the least change that as many pairs of this spread would show four times out of five.
    ``confirmation`` holds the fresh pairs that a first SLOWER was checked with.
    """

    answer: Answer
    statement: str
    question: Question
    ratio: float | None
    interval: Interval | None
    detectable_effect: float | None
    pairs: tuple[Pair, ...]
    confirmation: tuple[Pair, ...] = ()
    notes: tuple[str, ...] = ()


def run_gate(question: Question, measure: Callable[[Side], float]) -> Regression:
    """Measure pairs until they decide, at most ``max_rounds``; then confirm a SLOWER by fresh pairs, likewise.

    Args:
        question: what is asked.
        measure: runs that side once in a fresh process and returns the metric.
    """
    pairs = _measure_until_decided(question, measure)
    if _decide(question, pairs) != "SLOWER":
        return judge(question, pairs)
    return judge(question, pairs, confirmation=_measure_until_decided(question, measure))


def judge(
    question: Question,
    pairs: Sequence[Pair],
    *,
    confirmation: Sequence[Pair] | None = None,
    notes: tuple[str, ...] = (),
) -> Regression:
    """The answer of pairs that were measured; ``confirmation`` has to say SLOWER as well where the pairs do.

    A confirmation that is only undecided leaves the answer INCONCLUSIVE; one that says otherwise has the last word.
    """
    answer = _decide(question, pairs)
    if answer == "SLOWER" and confirmation is not None:
        answer = _decide(question, confirmation)
    logs = _log_ratios(pairs)
    half = half_width(logs) if len(logs) >= MIN_PAIRS else None
    center = math.fsum(logs) / len(logs) if logs else None
    span = (
        Interval(math.exp(center - half), math.exp(center + half)) if center is not None and half is not None else None
    )
    ratio = math.exp(center) if center is not None else None
    effect = _detectable_effect(logs)
    return Regression(
        answer=answer,
        statement=_statement(question, answer, ratio, span, effect, len(pairs)),
        question=question,
        ratio=ratio,
        interval=span,
        detectable_effect=effect,
        pairs=tuple(pairs),
        confirmation=tuple(confirmation or ()),
        notes=notes,
    )


def exit_code_of(regression: Regression, *, is_strict: bool) -> int:
    """0 same or better, 1 worse, 3 no data, 4 undecided where that is not good enough."""
    return {"FASTER": 0, "SAME": 0, "SLOWER": 1, "NO DATA": 3, "INCONCLUSIVE": 4 if is_strict else 0}[regression.answer]


def _measure_until_decided(question: Question, measure: Callable[[Side], float]) -> list[Pair]:
    pairs = [_measure_pair(measure, i) for i in range(question.rounds)]
    while _decide(question, pairs) == "INCONCLUSIVE" and len(pairs) < question.max_rounds:
        pairs.append(_measure_pair(measure, len(pairs)))
    return pairs


def _measure_pair(measure: Callable[[Side], float], index: int) -> Pair:
    """Which side goes first alternates, so that going first helps neither."""
    if index % 2 == 0:
        base = measure("base")
        return Pair(base, measure("new"))
    new = measure("new")
    return Pair(measure("base"), new)


def _log_ratios(pairs: Sequence[Pair]) -> list[float]:
    """ln(new / base) of every pair that has a ratio."""
    return [
        math.log(pair.new / pair.base)
        for pair in pairs
        if 0 < pair.base < math.inf and 0 < pair.new < math.inf  # NaN fails too
    ]


def _decide(question: Question, pairs: Sequence[Pair]) -> Answer:
    """By the interval of the mean log gain (positive is better) and the least effect that matters.

    Worse or better: the interval leaves out 0 and its middle is beyond the least effect. The same: all of the interval
    is within the least effect. Everything else is undecided.
    """
    logs = _log_ratios(pairs)
    if len(logs) < MIN_PAIRS or len(logs) < len(pairs):
        return "NO DATA"
    half = half_width(logs)
    assert half is not None
    gain = math.fsum(logs) / len(logs) * (1 if question.is_higher_better else -1)
    least = math.log1p(question.min_effect)
    if gain + half < 0 and gain <= -least:
        return "SLOWER"
    if gain - half > 0 and gain >= least:
        return "FASTER"
    return "SAME" if abs(gain) + half <= least else "INCONCLUSIVE"


def _detectable_effect(logs: Sequence[float]) -> float | None:
    """``exp((t_0.975 + t_0.8) * s / sqrt(n)) - 1``."""
    half = half_width(logs) if len(logs) >= MIN_PAIRS else None
    if half is None:
        return None
    degrees = len(logs) - 1
    scale = 1 + t_quantile(degrees, confidence=2 * POWER - 1) / t_quantile(degrees, confidence=CONFIDENCE)
    return math.expm1(half * scale)


def _statement(
    question: Question, answer: Answer, ratio: float | None, span: Interval | None, effect: float | None, pairs: int
) -> str:
    if ratio is None or span is None or effect is None:
        return f"NO DATA: {question.metric} needs at least {MIN_PAIRS} pairs of finite values above 0, got {pairs}"
    better = "higher" if question.is_higher_better else "lower"
    return (
        f"{answer}: {question.metric} ({better} is better) new / base {ratio:.3f} [{span.low:.3f}, {span.high:.3f}] "
        f"over {pairs} pairs; least effect that counts {question.min_effect:.1%}, detectable {effect:.1%}"
    )
