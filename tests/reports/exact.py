"""A gate on computed figures: they are the same on every machine, so one value of each side decides."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from helixbench.records import Provenance
from helixbench.reports.formatting import number
from helixbench.reports.gate.cases import Case, Status

# Versions of a solver agree this closely if nothing has changed.
ROUNDING = 1e-6


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One computed number. ``tolerance`` is the share by which it may be worse; ``equal`` allows neither direction."""

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


def exact_cases(base: Figures, new: Figures) -> tuple[Case, ...]:
    """One case per figure of either side. A figure that NEW lacks is an error; one that BASE lacks passes.

    Direction and tolerance are BASE's, so that NEW cannot loosen its own gate.
    """
    names = dict.fromkeys((*base.figures, *new.figures))
    return tuple(_case(name, base.figures.get(name), new.figures.get(name)) for name in names)


def _case(name: str, base: Figure | None, new: Figure | None) -> Case:
    if base is None:
        return Case(suite="exact", name=name, status=Status.PASSED, message=f"new figure: {_value(new)}")
    if new is None:
        return Case(suite="exact", name=name, status=Status.ERROR, message=f"was {_value(base)}, is missing now")
    change = new.value - base.value
    allowed = abs(base.value) * base.tolerance + ROUNDING * ROUNDING
    is_worse = {"higher": -change > allowed, "lower": change > allowed, "equal": abs(change) > allowed}[base.better]
    share = f" ({change / abs(base.value):+.2%})" if base.value else ""
    wanted = {"higher": "higher is better", "lower": "lower is better", "equal": "must stay equal"}[base.better]
    return Case(
        suite="exact",
        name=name,
        status=Status.FAILED if is_worse else Status.PASSED,
        message=f"{_value(base)} became {_value(new)}{share}; {wanted}, tolerance {base.tolerance:.2g}",
    )


def _value(figure: Figure | None) -> str:
    return number(figure.value) if figure else ""
