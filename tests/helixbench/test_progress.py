"""Progress where stderr is no terminal."""

from __future__ import annotations

import pytest

from helixbench.progress import Reporter


def test_a_line_says_how_much_is_done_and_of_a_total_of_0_all_is(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter() as reporter:
        reporter.update("half", 5, 10)
        reporter.update("nothing to do", 0, 0)
    assert capsys.readouterr().err.split("\n")[:2] == ["  half: 50 %", "  nothing to do: 100 %"]
