"""Summary of a gate's cases, for Markdown comments."""

from __future__ import annotations

from collections.abc import Sequence

from helixbench.reports.gate.cases import Case, Status, worst_first
from helixbench.reports.render.document import BAD, CAUTION, GOOD, Document, Styled, section

_STYLE = {Status.FAILED: BAD, Status.ERROR: CAUTION, Status.UNDECIDED: CAUTION, Status.PASSED: GOOD}


def gate_summary(cases: Sequence[Case]) -> Document:
    """Cases that did not pass, the worst first, then those that did."""
    ordered = worst_first(cases)
    passed = [case for case in ordered if case.status is Status.PASSED]
    others = [case for case in ordered if case.status is not Status.PASSED]
    return Document(
        kind="gate",
        title=f"{len(others)} of {len(ordered)} not passed" if others else f"passed ({len(ordered)} checks)",
        sections=(
            section(
                "Not passed",
                "",
                ("", "check", "message"),
                ((Styled(c.status, _STYLE[c.status]), f"{c.suite}: {c.name}", c.message) for c in others),
                is_detail=False,
            ),
            section("Passed", "", ("check", "message"), ((f"{c.suite}: {c.name}", c.message) for c in passed)),
        ),
    )
