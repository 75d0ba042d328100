"""Gate cases as GitHub Actions annotations: lines on stdout that the runner shows beside the job."""

from __future__ import annotations

from collections.abc import Sequence

from helixbench.reports.gate.cases import Case, Status, worst_first

# GitHub shows at most ten of each kind per step and drops the rest silently.
MAX_OF_A_KIND = 10
_COMMANDS = {
    Status.FAILED: "error",
    Status.ERROR: "error",
    Status.UNDECIDED: "warning",
    Status.PASSED: "notice",
}


def annotation_lines(cases: Sequence[Case]) -> tuple[str, ...]:
    """One line per case, the worst first; the last line of a kind counts the cases beyond the limit."""
    lines: dict[str, list[str]] = {}  # kind -> its lines
    for case in worst_first(cases):
        title = _property(f"helixbench {case.suite}: {case.name}")
        lines.setdefault(_COMMANDS[case.status], []).append(f"title={title}::{_data(case.message)}")
    for own in lines.values():
        if len(own) > MAX_OF_A_KIND:
            left = len(own) - MAX_OF_A_KIND + 1
            own[MAX_OF_A_KIND - 1 :] = [f"title=helixbench::and {left} more; see the log"]
    return tuple(f"::{command} {line}" for command, own in lines.items() for line in own)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
