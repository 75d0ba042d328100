"""Is NEW slower than BASE? Decided from pairs of measurements, by direction and by the smallest effect that matters.

Each pair is one fresh process of each side, run back to back, so that drift (heat, neighbours, caches) hits both. The
interval is Student's t on the log ratios of the pairs. Iterations inside one process are not independent samples: they
share its address layout, hash seeds and neighbours, so a test on them mistakes those for an effect of the code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Literal

import msgspec

from helixbench.reports.verdict.intervals import CONFIDENCE, half_width, t_quantile
from helixbench.reports.verdict.run_metrics import IS_HIGHER_BETTER
from helixbench.reports.verdict.verdict import Interval

Side = Literal["base", "new"]

MIN_PAIRS = 3
POWER = 0.8


class Answer(StrEnum):
    """``INCONCLUSIVE``: the noise is too large to decide. ``NO_DATA``: too few pairs with finite positive values."""

    FASTER = "FASTER"
    SAME = "SAME"
    SLOWER = "SLOWER"
    INCONCLUSIVE = "INCONCLUSIVE"
    NO_DATA = "NO DATA"


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The metric, the direction that is better, and the smallest relative change that matters.

    ``rounds`` pairs are measured first, then more up to ``max_rounds`` while undecided. A SLOWER is confirmed with as
    many fresh pairs.
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
    """The answer. ``ratio`` is new / base, the geometric mean over the pairs, with its 95 % interval.

    ``detectable_effect`` is the smallest change that this many pairs with this variance detect with probability 0.8.
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


def is_higher_better(metric: str) -> bool | None:
    """The better direction of a metric, by its name; ``None`` if the name does not tell."""
    if metric in IS_HIGHER_BETTER:
        return IS_HIGHER_BETTER[metric]
    if metric.endswith("_per_s"):
        return True
    return False if metric.endswith("_s") else None


def measure_regression(question: Question, measure: Callable[[Side], float]) -> Regression:
    """Measure pairs until they decide, at most ``max_rounds``; confirm a SLOWER with fresh pairs.

    Args:
        question: what to decide.
        measure: runs that side once in a fresh process and returns the metric.
    """
    pairs = _measure_until_decided(question, measure)
    if _decide(question, pairs) is not Answer.SLOWER:
        return judge(question, pairs)
    return judge(question, pairs, confirmation=_measure_until_decided(question, measure))


def judge(
    question: Question,
    pairs: Sequence[Pair],
    *,
    confirmation: Sequence[Pair] | None = None,
    notes: tuple[str, ...] = (),
) -> Regression:
    """The answer for measured pairs. Where they say SLOWER, ``confirmation`` if given has the last word."""
    answer = _decide(question, pairs)
    if answer is Answer.SLOWER and confirmation is not None:
        answer = _decide(question, confirmation)
    logs = _log_ratios(pairs)
    ratio = interval = effect = None
    if len(logs) >= MIN_PAIRS and (half := half_width(logs)) is not None:
        center = math.fsum(logs) / len(logs)
        ratio = math.exp(center)
        interval = Interval(math.exp(center - half), math.exp(center + half))
        effect = _detectable_effect(half, num_pairs=len(logs))
    return Regression(
        answer=answer,
        statement=_statement(question, answer, ratio, interval, effect, len(pairs)),
        question=question,
        ratio=ratio,
        interval=interval,
        detectable_effect=effect,
        pairs=tuple(pairs),
        confirmation=tuple(confirmation or ()),
        notes=notes,
    )


def _measure_until_decided(question: Question, measure: Callable[[Side], float]) -> list[Pair]:
    pairs = [_measure_pair(measure, i) for i in range(question.rounds)]
    while _decide(question, pairs) is Answer.INCONCLUSIVE and len(pairs) < question.max_rounds:
        pairs.append(_measure_pair(measure, len(pairs)))
    return pairs


def _measure_pair(measure: Callable[[Side], float], index: int) -> Pair:
    """The side that goes first alternates, so that the order favours neither."""
    if index % 2 == 0:
        base = measure("base")
        return Pair(base, measure("new"))
    new = measure("new")
    return Pair(measure("base"), new)


def _log_ratios(pairs: Sequence[Pair]) -> list[float]:
    """ln(new / base) of the pairs with finite positive values; the comparisons are false for NaN too."""
    return [math.log(pair.new / pair.base) for pair in pairs if 0 < pair.base < math.inf and 0 < pair.new < math.inf]


def _decide(question: Question, pairs: Sequence[Pair]) -> Answer:
    """From the interval of the mean log gain (positive is better) and the smallest effect that matters.

    Better or worse: the interval excludes 0 and its centre is beyond the smallest effect. The same: the whole interval
    is within the smallest effect. Anything else is undecided.
    """
    logs = _log_ratios(pairs)
    if len(logs) < MIN_PAIRS or len(logs) < len(pairs):
        return Answer.NO_DATA
    half = half_width(logs)
    assert half is not None
    gain = math.fsum(logs) / len(logs) * (1 if question.is_higher_better else -1)
    least = math.log1p(question.min_effect)
    if gain + half < 0 and gain <= -least:
        return Answer.SLOWER
    if gain - half > 0 and gain >= least:
        return Answer.FASTER
    return Answer.SAME if abs(gain) + half <= least else Answer.INCONCLUSIVE


def _detectable_effect(half: float, *, num_pairs: int) -> float:
    """``exp((t_0.975 + t_0.8) * s / sqrt(n)) - 1``, where ``half`` is ``t_0.975 * s / sqrt(n)``."""
    degrees = num_pairs - 1
    scale = 1 + t_quantile(degrees, confidence=2 * POWER - 1) / t_quantile(degrees, confidence=CONFIDENCE)
    return math.expm1(half * scale)


def _statement(
    question: Question, answer: Answer, ratio: float | None, span: Interval | None, effect: float | None, pairs: int
) -> str:
    if ratio is None or span is None or effect is None:
        return f"NO DATA: {question.metric} needs at least {MIN_PAIRS} pairs of finite positive values, got {pairs}"
    better = "higher" if question.is_higher_better else "lower"
    return (
        f"{answer}: {question.metric} ({better} is better) new / base {ratio:.3f} [{span.low:.3f}, {span.high:.3f}] "
        f"over {pairs} pairs; smallest effect that matters {question.min_effect:.1%}, detectable {effect:.1%}"
    )
