"""Gate answers as test cases: what JUnit, workflow annotations and Markdown are made from."""

from __future__ import annotations

from typing import Literal

import msgspec

from helixbench.reports.compare.regression import Regression
from helixbench.reports.compare.regression import exit_code_of as regression_exit_code
from helixbench.reports.verdict.verdict import Verdict

Status = Literal["passed", "failed", "error", "undecided"]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was asked. ``error`` is where nothing could be measured, ``undecided`` where noise hides it."""

    suite: str
    name: str
    status: Status
    message: str
    details: tuple[str, ...] = ()


# The worst comes first wherever cases are listed.
_ORDER: dict[Status, int] = {"failed": 0, "error": 1, "undecided": 2, "passed": 3}


def worst_first(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """Failed, error, undecided, passed; otherwise in the given order."""
    return tuple(sorted(cases, key=lambda case: _ORDER[case.status]))


def calibration_cases(verdict: Verdict) -> tuple[Case, ...]:
    """The run against its plan, and each check of the record against itself."""
    status: Status = "passed" if verdict.outcome == "as predicted" else "failed"
    if verdict.outcome == "could not measure":
        status = "error"
    return (
        Case(
            suite="calibration",
            name=f"{'simulated' if verdict.is_simulated else 'measured'} against expected "
            f"at concurrency {verdict.concurrency}",
            status=status,
            message=verdict.statement,
            details=(*verdict.causes, *((verdict.testbed,) if verdict.testbed else ()), *verdict.notes),
        ),
        *(
            Case(
                suite="integrity",
                name=check.name,
                status="passed" if check.is_passed else "error",
                message=check.message,
            )
            for check in verdict.checks
        ),
    )


def regression_cases(regression: Regression, *, is_strict: bool) -> tuple[Case, ...]:
    """The one question of a regression gate; undecided counts as failed only where that is asked for."""
    statuses: dict[int, Status] = {0: "passed", 1: "failed", 3: "error", 4: "failed"}
    status = statuses[regression_exit_code(regression, is_strict=is_strict)]
    if regression.answer == "INCONCLUSIVE" and not is_strict:
        status = "undecided"
    return (
        Case(
            suite="regression",
            name=regression.question.metric,
            status=status,
            message=regression.statement,
            details=(
                *regression.notes,
                *(f"pair {i}: base {pair.base:.6g}, new {pair.new:.6g}" for i, pair in enumerate(regression.pairs, 1)),
                *(f"fresh pair: base {pair.base:.6g}, new {pair.new:.6g}" for pair in regression.confirmation),
            ),
        ),
    )
