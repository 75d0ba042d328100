"""Gate answers as workflow annotations of GitHub Actions: lines on stdout that the runner turns into notes."""

from __future__ import annotations

from collections.abc import Sequence

from helixbench.reports.gate.cases import Case, Status, worst_first

# GitHub shows at most ten of a kind per step; the rest would vanish without a word.
MAX_OF_A_KIND = 10
_COMMANDS: dict[Status, str] = {"failed": "error", "error": "error", "undecided": "warning", "passed": "notice"}


def annotation_lines(cases: Sequence[Case]) -> tuple[str, ...]:
    """One line per case, the worst first; what does not fit is counted in the last line of its kind."""
    lines: dict[str, list[str]] = {}
    for case in worst_first(tuple(cases)):
        command = _COMMANDS[case.status]
        title = _property(f"helixbench {case.suite}: {case.name}")
        lines.setdefault(command, []).append(f"::{command} title={title}::{_data(case.message)}")
    return tuple(line for command, own in lines.items() for line in _within_limit(command, own))


def _within_limit(command: str, lines: list[str]) -> list[str]:
    if len(lines) <= MAX_OF_A_KIND:
        return lines
    left = len(lines) - MAX_OF_A_KIND + 1
    return [*lines[: MAX_OF_A_KIND - 1], f"::{command} title=helixbench::and {left} more; see the log"]


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
