"""The gate on figures that are computed, not measured: the same on every machine, so one of each side decides."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec

from helixbench.errors import InputError, MeasurementError
from helixbench.records import Provenance, load_record
from helixbench.reports.gate.cases import Case
from helixbench.reports.render.text import number
from helixbench.solver.problem.plan import Plan

# Two solvers or two versions of one agree this closely where nothing has changed.
ROUNDING = 1e-6


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One computed number. ``tolerance`` is the share by which it may be worse; ``equal`` allows neither way."""

    value: float
    better: Literal["higher", "lower", "equal"]
    tolerance: float = ROUNDING

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance: need a share from 0 to below 1, got {self.tolerance}")
        if not math.isfinite(self.value):
            raise ValueError(f"value: need a finite number, got {self.value}")


class Figures(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    omit_defaults=True,
    tag_field="schema",
    tag="helixbench.figures/1",
):
    """Name -> figure."""

    figures: dict[str, Figure]
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        if not self.figures:
            raise ValueError("figures: need at least one")


def load_figures(path: Path, *, tolerance: float) -> Figures:
    """Figures from their own file, or those of a plan.

    Raises:
        MeasurementError: the file is not there or empty.
        InputError: it is neither of the two, or damaged.
    """
    if not path.exists() or not path.stat().st_size:
        raise MeasurementError(f"{path}: no such file, or an empty one, so there are no figures")
    try:
        return load_record(path, Figures)
    except InputError as not_figures:
        try:
            return figures_of_plan(load_record(path, Plan), tolerance=tolerance)
        except InputError as not_a_plan:
            raise InputError(f"{not_a_plan}; nor a set of figures ({not_figures})") from not_a_plan


def figures_of_plan(plan: Plan, *, tolerance: float) -> Figures:
    """What a plan promises."""
    figures = {
        "max_flow_tokens_per_s": Figure(
            value=plan.predicted.max_flow_tokens_per_s, better="higher", tolerance=tolerance
        )
    }
    for entry in plan.predicted.expected:
        figures[f"expected_tokens_per_s at {entry.concurrency}"] = Figure(
            value=entry.total_tokens_per_s, better="higher", tolerance=tolerance
        )
    return Figures(figures=figures)


def exact_cases(base: Figures, new: Figures) -> tuple[Case, ...]:
    """One case per figure of either side. A figure that NEW lacks could not be measured; one that BASE lacks passes.

    Direction and tolerance are BASE's: what is gated cannot loosen its own gate.
    """
    names = dict.fromkeys((*base.figures, *new.figures))
    return tuple(_case(name, base.figures.get(name), new.figures.get(name)) for name in names)


def exit_code_of(cases: tuple[Case, ...]) -> int:
    """1 where one is worse, 3 where one is missing, else 0."""
    statuses = {case.status for case in cases}
    if "failed" in statuses:
        return 1
    return 3 if "error" in statuses else 0


def _case(name: str, base: Figure | None, new: Figure | None) -> Case:
    if base is None:
        return Case(suite="exact", name=name, status="passed", message=f"new figure: {_value(new)}")
    if new is None:
        return Case(suite="exact", name=name, status="error", message=f"was {_value(base)}, is missing now")
    change = new.value - base.value
    allowed = abs(base.value) * base.tolerance + ROUNDING * ROUNDING
    is_worse = {"higher": -change > allowed, "lower": change > allowed, "equal": abs(change) > allowed}[base.better]
    share = f" ({change / abs(base.value):+.2%})" if base.value else ""
    wanted = {"higher": "higher is better", "lower": "lower is better", "equal": "has to stay"}[base.better]
    return Case(
        suite="exact",
        name=name,
        status="failed" if is_worse else "passed",
        message=f"{_value(base)} became {_value(new)}{share}; {wanted}, tolerance {base.tolerance:.2g}",
    )


def _value(figure: Figure | None) -> str:
    return number(figure.value) if figure else ""
