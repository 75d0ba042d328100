from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixbench.errors import InputError, MeasurementError
from helixbench.reports.compare.regression import Pair, Question, Regression, Side, judge, measure_regression
from helixbench.reports.gate.cases import exit_code_of, regression_cases
from helixbench.reports.gate.pairs import read_metric, run_once, split_command
from tests.reports.conftest import Command
from tests.reports.report_examples import example_run

Save = Callable[[msgspec.Struct | bytes, str], Path]
replace = msgspec.structs.replace
LOWER = Question(metric="median_s", is_higher_better=False)
HIGHER = Question(metric="total_tokens_per_s", is_higher_better=True)


def noisy(seed: int, *, factor: float, noise: float) -> Callable[[Side], float]:
    """A machine that drifts by a quarter, with noise of each process on top; NEW takes ``factor`` times as long."""
    rng = random.Random(seed)
    calls = itertools.count()

    def measure(side: Side) -> float:
        drift = 1 + 0.25 * math.sin(next(calls) / 7)
        return drift * (factor if side == "new" else 1.0) * math.exp(rng.gauss(0, noise))

    return measure


@pytest.mark.parametrize(
    ("question", "factor", "answer"),
    [
        (LOWER, 1.0, "SAME"),
        (LOWER, 1.2, "SLOWER"),
        (LOWER, 0.8, "FASTER"),
        (HIGHER, 1.2, "FASTER"),
        (HIGHER, 0.8, "SLOWER"),
    ],
)
def test_the_answer_follows_the_direction(question: Question, factor: float, answer: str) -> None:
    result = measure_regression(question, noisy(3, factor=factor, noise=0.005))

    assert result.answer == answer
    assert result.interval is not None
    assert result.interval.low <= factor <= result.interval.high
    assert bool(result.confirmation) == (answer == "SLOWER")


def test_undecided_pairs_are_added_up_to_the_limit() -> None:
    result = measure_regression(LOWER, noisy(5, factor=1.05, noise=0.2))

    assert result.answer == "INCONCLUSIVE"
    assert len(result.pairs) == LOWER.max_rounds
    assert result.detectable_effect is not None
    assert result.detectable_effect > LOWER.min_effect
    assert exit_code_of(regression_cases(result), is_strict=False) == 0
    assert exit_code_of(regression_cases(result), is_strict=True) == 4


def test_a_change_below_the_least_effect_is_the_same() -> None:
    result = judge(LOWER, [Pair(1.0, 1.01)] * 3 + [Pair(1.0, 1.0101)] * 3)

    assert result.answer == "SAME"
    assert result.interval is not None
    assert result.interval.low > 1


def test_a_slower_that_fresh_pairs_do_not_confirm_is_not_reported() -> None:
    slow = [Pair(1.0, 1.2), Pair(1.0, 1.21), Pair(1.0, 1.22)]
    same = [Pair(1.0, 1.0), Pair(1.0, 1.001), Pair(1.0, 0.999)]

    assert judge(LOWER, slow, confirmation=slow).answer == "SLOWER"
    assert judge(LOWER, slow, confirmation=same).answer == "SAME"


def test_the_side_that_goes_first_alternates() -> None:
    order: list[Side] = []

    def measure(side: Side) -> float:
        order.append(side)
        return 1.0 + len(order) * 1e-6

    measure_regression(replace(LOWER, rounds=4, max_rounds=4), measure)

    assert order == ["base", "new", "new", "base", "base", "new", "new", "base"]


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [Pair(1.0, 1.0)] * 2,
        [Pair(1.0, math.nan)] * 6,
        [Pair(0.0, 1.0)] * 6,
        [Pair(1.0, 1.0)] * 6 + [Pair(1.0, math.inf)],
        [Pair(-1.0, -1.0)] * 6,
    ],
)
def test_pairs_without_numbers_are_no_data_and_never_pass(pairs: list[Pair]) -> None:
    result = judge(LOWER, pairs)

    assert result.answer == "NO DATA"
    assert exit_code_of(regression_cases(result), is_strict=False) == 3


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=3, max_size=12))
def test_swapping_the_sides_swaps_the_answer(values: list[tuple[float, float]]) -> None:
    forward = judge(LOWER, [Pair(base, new) for base, new in values])
    backward = judge(LOWER, [Pair(new, base) for base, new in values])

    opposite = {"SLOWER": "FASTER", "FASTER": "SLOWER"}
    assert forward.ratio is not None
    assert backward.ratio is not None
    assert forward.ratio * backward.ratio == pytest.approx(1)
    assert backward.answer == opposite.get(forward.answer, forward.answer)


def test_the_question_is_checked() -> None:
    with pytest.raises(ValueError, match="min_effect"):
        replace(LOWER, min_effect=0.0)
    with pytest.raises(ValueError, match="max_rounds"):
        replace(LOWER, rounds=9, max_rounds=3)


# Commands


def say(text: str) -> str:
    return f"{sys.executable} -c \"print('noise'); print('{text}')\""


def test_a_metric_is_read_from_the_last_line() -> None:
    command = split_command(f'{sys.executable} -c "print(\'x\'); print(\'{{\\"a\\": {{\\"b\\": 2.5}}}}\')"')

    assert run_once(command, "a.b", timeout_s=30) == 2.5


def test_a_metric_is_read_from_the_file_that_a_command_writes(save: Save) -> None:
    run = example_run()
    source = save(run, "run.json")
    copy = (sys.executable, "-c", "import shutil, sys; shutil.copy(*sys.argv[1:])", str(source), "{out}")

    assert run_once(copy, "total_tokens_per_s", timeout_s=30) == run.total_tokens_per_s


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('it broke')", "it broke"),
        ("pass", "not a JSON object"),
        ("print('{}')", "has no 'median_s'"),
        ("print('{\"median_s\": true}')", "not a number"),
        ("import time; time.sleep(60)", "timed out after"),
    ],
)
def test_a_command_that_says_nothing_could_not_be_measured(code: str, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        run_once((sys.executable, "-c", code), "median_s", timeout_s=1.0 if "sleep" in code else 30.0)


def test_a_program_that_is_not_there_is_bad_input() -> None:
    with pytest.raises(InputError, match="cannot be run"):
        run_once(("/no/such/program",), "wall_s", timeout_s=1)
    with pytest.raises(InputError, match="quot"):
        split_command("say 'hello")


def test_a_run_that_contradicts_itself_gives_no_metric() -> None:
    run = example_run()
    broken = msgspec.json.encode(replace(run, prompt_tokens=run.prompt_tokens * 3))

    with pytest.raises(MeasurementError, match="contradicts"):
        read_metric(broken, "total_tokens_per_s", origin="run.json")


def test_gate_pairs_runs_both_commands(command: Command, tmp_path: Path) -> None:
    fast = f'{sys.executable} -c "print(\'{{\\"median_s\\": 1.0}}\')"'
    slow = f'{sys.executable} -c "print(\'{{\\"median_s\\": 1.5}}\')"'

    result = command(
        *("gate", "pairs", "--base", fast, "--new", slow, "--metric", "median_s", "--rounds", "3", "--json"),
        *("--junit", tmp_path / "j.xml"),
    )

    assert result.exit_code == 1
    regression = msgspec.json.decode(result.stdout, type=Regression)
    assert regression.answer == "SLOWER"
    assert regression.pairs == (Pair(1.0, 1.5),) * 3
    assert 'failures="1"' in (tmp_path / "j.xml").read_text()


def write_runs(folder: Path, *, speed: float, hours: str) -> Path:
    folder.mkdir()
    for seed, hour in enumerate(hours):
        run = example_run(seed=seed, speed=speed)
        created = f"2026-05-04T0{hour}:00:00+00:00"
        run = replace(run, provenance=replace(run.provenance, created=created))
        (folder / f"{seed}.json").write_bytes(msgspec.json.encode(run))
    return folder


def test_recorded_runs_are_paired_in_the_order_in_which_they_were_made(command: Command, tmp_path: Path) -> None:
    base = write_runs(tmp_path / "base", speed=1.0, hours="0246")
    new = write_runs(tmp_path / "new", speed=0.8, hours="1357")

    result = command("gate", base, new)

    assert result.exit_code == 1
    assert "SLOWER" in result.stdout
    assert "drift" not in result.stdout
    assert command("gate", base, write_runs(tmp_path / "again", speed=1.0, hours="1357")).exit_code == 0


def test_recorded_runs_that_were_not_interleaved_say_so(command: Command, tmp_path: Path) -> None:
    base = write_runs(tmp_path / "base", speed=1.0, hours="0123")
    new = write_runs(tmp_path / "new", speed=1.0, hours="5678")

    assert "drift of the machine" in command("gate", base, new).stdout


def test_recorded_runs_without_pairs_could_not_be_measured(command: Command, tmp_path: Path, save: Save) -> None:
    base = write_runs(tmp_path / "base", speed=1.0, hours="024")
    one = save(example_run(), "one.json")
    (tmp_path / "none").mkdir()

    assert command("gate", base, one).exit_code == 3
    assert command("gate", one, one).exit_code == 3
    assert command("gate", base, tmp_path / "none").exit_code == 3


def test_the_same_run_twice_is_no_repeat(command: Command, tmp_path: Path) -> None:
    base = write_runs(tmp_path / "base", speed=1.0, hours="024")
    (base / "copy.json").write_bytes((base / "0.json").read_bytes())

    result = command("gate", base, base)

    assert result.exit_code == 2
    assert "a copy is not a repeat" in result.stderr
