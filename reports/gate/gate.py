"""The calibration gate: does a run hold what its plan promised? Measured against expected and against the bound."""

from __future__ import annotations

import msgspec

from helixbench.reference_server.run_log import RunLog
from helixbench.reports.verdict.validate import validate
from helixbench.reports.verdict.verdict import Band, Verdict

PASS, FAIL, COULD_NOT_MEASURE = 0, 1, 3


class GateResult(msgspec.Struct, frozen=True, kw_only=True):
    """The gate's answer. ``exit_code``: 0 passed, 1 failed, 3 could not measure. A missing number never passes."""

    exit_code: int
    message: str
    verdict: Verdict

    @property
    def is_passed(self) -> bool:
        """Whether the run holds what was promised."""
        return self.exit_code == PASS


def gate(run: RunLog, *, min_ratio: float = 0.85, max_ratio: float = 1.05) -> GateResult:
    """Pass where measured / expected lies in ``[min_ratio, max_ratio]`` and measured is not above the bound.

    Raises:
        ValueError: not ``0 < min_ratio <= max_ratio``.
    """
    verdict = validate(run, Band(min_ratio=min_ratio, max_ratio=max_ratio))
    return GateResult(exit_code=exit_code_of(verdict), message=verdict.statement, verdict=verdict)


def exit_code_of(verdict: Verdict) -> int:
    """0 as predicted, 3 could not measure, 1 everything else."""
    if verdict.outcome == "could not measure":
        return COULD_NOT_MEASURE
    return PASS if verdict.outcome == "as predicted" else FAIL
