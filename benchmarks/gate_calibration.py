"""Error rate of the regression gate on this machine: whole gates on identical code, or on code that is slower.

    python -m benchmarks.gate_calibration --trials 60                  # identical: SLOWER is a false alarm
    python -m benchmarks.gate_calibration --trials 60 --handicap 0.10  # NEW does 10 % more work: SLOWER is right

Also counts how often the first pair alone exceeds the smallest effect, which is the decision that
``pytest --benchmark-compare-fail=median:5%`` makes. Ctrl-C ends it after the last complete trial. ``--load WORK`` is
the load itself, which the script runs in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ITERATIONS = 25
UNIT = 24_000


def run_load(work: float) -> dict[str, float]:
    """``work`` times a fixed amount of arithmetic, timed per iteration."""
    timings_s, size = [], round(UNIT * work)
    for _ in range(ITERATIONS):
        began_s = time.perf_counter()
        table: dict[int, int] = {}
        for i in range(size):
            table[i & 1023] = table.get(i & 1023, 0) + i
        timings_s.append(time.perf_counter() - began_s)
    return {"median_s": statistics.median(timings_s), "size": size}


if __name__ == "__main__" and sys.argv[1:2] == ["--load"]:
    # Before the imports below: the load is to be timed by processes that start fast.
    print(json.dumps(run_load(float(sys.argv[2]))))
    sys.exit(0)

from helixbench.reports.compare.regression import (  # noqa: E402
    Answer,
    Question,
    Regression,
    Side,
    measure_regression,
)
from helixbench.reports.gate.pairs import measure_commands  # noqa: E402
from helixbench.reports.verdict.intervals import CONFIDENCE  # noqa: E402
from helixbench.reports.verdict.verdict import Interval  # noqa: E402


@dataclass(frozen=True)
class Calibration:
    """Answers of many trials. ``slower_share`` has an exact (Clopper-Pearson) 95 % interval."""

    num_trials: int
    answers: dict[Answer, int]
    slower_share: float
    interval: Interval
    single_pair_share: float
    processes: int


def calibrate(
    question: Question,
    measure: Callable[[Side], float],
    *,
    trials: int,
    on_trial: Callable[[int, Regression], None] = lambda _i, _regression: None,
) -> Calibration:
    """Run the whole gate ``trials`` times; Ctrl-C ends it after the last complete trial, if there is one."""
    results: list[Regression] = []
    try:
        for i in range(trials):
            results.append(measure_regression(question, measure))
            on_trial(i, results[-1])
    except KeyboardInterrupt:
        if not results:
            raise
    return summarise(question, results)


def summarise(question: Question, results: Sequence[Regression]) -> Calibration:
    """Counts and shares of the answers."""
    answers = Counter(result.answer for result in results)
    slower, trials = answers[Answer.SLOWER], len(results)
    return Calibration(
        num_trials=trials,
        answers=dict(answers),
        slower_share=slower / trials,
        interval=share_interval(slower, trials),
        single_pair_share=sum(_is_first_pair_worse(question, result) for result in results) / trials,
        processes=sum(2 * (len(result.pairs) + len(result.confirmation)) for result in results),
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


def load_command(*, work: float) -> str:
    """The command line of the built-in load."""
    return shlex.join([sys.executable, "-m", "benchmarks.gate_calibration", "--load", f"{work:.6g}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="gates to run")
    parser.add_argument("--handicap", type=float, default=0.0, help="share of additional work for NEW")
    parser.add_argument("--min-effect", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--max-rounds", type=int, default=16)
    options = parser.parse_args()
    question = Question(
        metric="median_s",
        is_higher_better=False,
        min_effect=options.min_effect,
        rounds=options.rounds,
        max_rounds=options.max_rounds,
    )
    commands = {"base": load_command(work=1.0), "new": load_command(work=1.0 + options.handicap)}
    found = calibrate(
        question,
        measure_commands(commands, "median_s", timeout_s=600.0),
        trials=options.trials,
        on_trial=lambda i, one: print(f"trial {i + 1}/{options.trials}  {one.statement}", file=sys.stderr),
    )
    what = "false alarms" if options.handicap == 0 else f"found at +{options.handicap:.0%}"
    print(f"{what}: {found.slower_share:.1%} of {found.num_trials} trials", end="")
    print(f", 95 % interval {found.interval.low:.1%} .. {found.interval.high:.1%}", end="")
    print(f"; by the first pair alone at {question.min_effect:.0%}: {found.single_pair_share:.1%}", end="")
    counts = ", ".join(f"{answer} {count}" for answer, count in found.answers.items())
    print(f"; {counts}; {found.processes} processes")


if __name__ == "__main__":
    main()
