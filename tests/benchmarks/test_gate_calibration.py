from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from pytest_benchmark.utils import PercentageRegressionCheck

from benchmarks.gate_calibration import calibrate, load_command, share_interval, summarise
from helixbench.reports.compare.regression import Pair, Question, Side, judge
from helixbench.reports.gate.pairs import split_command
from tests.reports.compare.test_regression_gate import LOWER, noisy

ROOT = Path(__file__).parents[2]


def test_false_alarms_are_rare_on_a_noisy_drifting_machine_and_real_changes_are_found() -> None:
    same = calibrate(LOWER, noisy(1, factor=1.0, noise=0.05), trials=200)
    slower = calibrate(LOWER, noisy(2, factor=1.2, noise=0.05), trials=50)

    assert same.slower_share <= 0.05
    assert slower.slower_share >= 0.9


def test_the_share_interval_is_exact_at_its_ends() -> None:
    assert share_interval(0, 60).low == 0.0
    assert share_interval(0, 60).high == pytest.approx(1 - 0.025 ** (1 / 60))
    assert share_interval(60, 60).high == 1.0


def test_the_built_in_load_does_more_work_with_a_handicap() -> None:
    reports = []
    for work in (1.0, 1.1):
        done = subprocess.run(split_command(load_command(work=work)), capture_output=True, check=True, cwd=ROOT)
        reports.append(json.loads(done.stdout))

    assert reports[1]["size"] == pytest.approx(1.1 * reports[0]["size"])
    assert all(report["median_s"] > 0 for report in reports)


def test_an_interrupted_calibration_counts_the_trials_that_were_whole() -> None:
    values = iter([1.0] * 12 + [1.0] * 5)  # two trials of three pairs, and not all of a third

    def measure(_side: Side) -> float:
        try:
            return next(values)
        except StopIteration:
            raise KeyboardInterrupt from None

    question = Question(metric="median_s", is_higher_better=False, rounds=3)

    assert calibrate(question, measure, trials=60).num_trials == 2
    with pytest.raises(KeyboardInterrupt):
        calibrate(question, measure, trials=60)


def test_the_threshold_on_the_first_pair_is_pytest_benchmarks_own() -> None:
    rule = PercentageRegressionCheck("median", 5.0)
    question = Question(metric="median_s", is_higher_better=False)

    for new in (0.9, 1.0, 1.04, 1.0499, 1.0501, 1.2):
        summary = summarise(question, [judge(question, [Pair(1.0, new), *([Pair(1.0, 1.0)] * 5)])])
        assert bool(summary.single_pair_share) == bool(rule.fails({"median": new}, {"median": 1.0})), new
