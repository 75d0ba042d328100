"""How often does the regression gate err? Trials on identical code, or on code that is slower by a known share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from helixbench.reports.compare.regression import Answer, Question, Regression, Side, run_gate
from helixbench.reports.verdict.intervals import CONFIDENCE
from helixbench.reports.verdict.verdict import Interval


class Calibration(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.calibration/1",
):
    """Answers of many trials. ``slower_share`` is the false-alarm rate where ``handicap`` is 0, else the found share.

    ``interval`` is its exact (Clopper-Pearson) 95 % interval. ``handicap`` is how much more NEW had to do.
    ``single_pair_share`` is how often the first pair alone was worse by more than the least effect: what a threshold on
    one process of each side says, as ``pytest --benchmark-compare-fail=median:5%`` does.
    """

    handicap: float
    num_trials: int
    answers: dict[Answer, int]
    slower_share: float
    interval: Interval
    single_pair_share: float
    question: Question
    processes: int
    statement: str


def calibrate(
    question: Question,
    measure: Callable[[Side], float],
    *,
    trials: int,
    handicap: float = 0.0,
    on_trial: Callable[[int, Regression], None] = lambda _i, _regression: None,
) -> Calibration:
    """Run the whole gate ``trials`` times; Ctrl-C ends it after the last whole trial, if there is one."""
    results: list[Regression] = []
    try:
        for i in range(trials):
            results.append(run_gate(question, measure))
            on_trial(i, results[-1])
    except KeyboardInterrupt:
        if not results:
            raise
    return summarise(question, results, handicap=handicap)


def summarise(question: Question, results: Sequence[Regression], *, handicap: float) -> Calibration:
    """Counts and shares of the trials' answers."""
    answers: dict[Answer, int] = {}
    for result in results:
        answers[result.answer] = answers.get(result.answer, 0) + 1
    slower, trials = answers.get("SLOWER", 0), len(results)
    span = share_interval(slower, trials)
    single = sum(_is_first_pair_worse(question, result) for result in results)
    what = "false alarms" if handicap == 0 else f"found at +{handicap:.0%}"
    return Calibration(
        handicap=handicap,
        num_trials=trials,
        answers=answers,
        slower_share=slower / trials,
        interval=span,
        single_pair_share=single / trials,
        question=question,
        processes=sum(2 * (len(result.pairs) + len(result.confirmation)) for result in results),
        statement=f"{what}: {slower} of {trials} trials = {slower / trials:.1%}, 95 % interval "
        f"{span.low:.1%} .. {span.high:.1%}; "
        f"by the first pair alone at a threshold of {question.min_effect:.0%}: {single} = {single / trials:.1%}",
    )


def _is_first_pair_worse(question: Question, result: Regression) -> bool:
    if not result.pairs or not result.pairs[0].base:
        return False
    change = result.pairs[0].new / result.pairs[0].base - 1
    return (-change if question.is_higher_better else change) > question.min_effect


def share_interval(count: int, trials: int) -> Interval:
    """Clopper-Pearson interval of a share."""
    from scipy import stats

    tail = (1 - CONFIDENCE) / 2
    low = float(stats.beta.ppf(tail, count, trials - count + 1)) if count else 0.0
    high = float(stats.beta.ppf(1 - tail, count + 1, trials - count)) if count < trials else 1.0
    return Interval(low, high)
