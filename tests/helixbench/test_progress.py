"""Progress where stderr is no terminal."""

from __future__ import annotations

import pytest

from helixbench.progress import Reporter, StepReporter


def test_a_line_says_how_much_is_done_and_of_a_total_of_0_all_is(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter() as reporter:
        reporter.update("half", 5, 10)
        reporter.update("nothing to do", 0, 0)
    assert capsys.readouterr().err.split("\n")[:2] == ["  half: 50 %", "  nothing to do: 100 %"]


def test_steps_are_numbered_timed_and_the_time_left_is_that_of_their_kind(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 60.0, 60.0, 180.0])
    monkeypatch.setattr("helixbench.progress.time.perf_counter", lambda: next(clock))
    with StepReporter({"profile": 1, "run": 3}) as reporter:
        reporter.keep("profile", "one")
        for _ in range(2):
            with reporter.step("run", "two"):
                pass
        reporter.skip("run")

    assert capsys.readouterr().err.splitlines() == [
        "[1/4] one: kept",
        "[2/4] two: 60.0 s, 2.0 min left",
        "[3/4] two: 120.0 s, 1.5 min left",
    ]


def test_steps_of_a_kind_that_never_ran_make_the_time_left_a_lower_bound(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 60.0])
    monkeypatch.setattr("helixbench.progress.time.perf_counter", lambda: next(clock))
    with StepReporter({"profile": 2, "run": 3}) as reporter, reporter.step("profile", "one"):
        pass

    assert capsys.readouterr().err == "[1/5] one: 60.0 s, 1.0 min left at least\n"
