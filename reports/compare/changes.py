"""One quantity in two records: its values as text, their ratio, and whether the difference is more than noise. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec

from helixbench.reports.render.text import number, seconds
from helixbench.reports.verdict.verdict import Interval

Judgement = Literal["better", "worse", "within noise", "changed", "unchanged"]
EXACT = 1e-9  # relative: below it two numbers are the same


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One quantity in both records, as text and, where it is a number, as new / base with an interval.

    ``judgement`` is ``changed`` where the noise is not known or neither direction is better.
    """

    name: str
    base: str
    new: str
    judgement: Judgement
    ratio: float | None = None
    interval: Interval | None = None


def quantity(
    name: str,
    base: float,
    new: float,
    *,
    is_higher_better: bool,
    interval: Interval | None = None,
    texts: tuple[str, str] | None = None,
) -> Change:
    """A number; without an interval the noise is not known and a difference is only ``changed``."""
    texts = texts or (
        (seconds(base), seconds(new)) if name.endswith("_s") and "per_s" not in name else (number(base), number(new))
    )
    found = new / base if base else 1.0 if new == base else None
    return Change(
        name=name,
        base=texts[0],
        new=texts[1],
        judgement=_judge(found, interval, is_higher_better=is_higher_better),
        ratio=found,
        interval=interval,
    )


def _judge(found: float | None, interval: Interval | None, *, is_higher_better: bool) -> Judgement:
    if found is not None and abs(found - 1) <= EXACT:
        return "unchanged"
    if interval is None:
        return "changed"
    if interval.low <= 1 <= interval.high:
        return "within noise"
    return "better" if (interval.low > 1) == is_higher_better else "worse"


def text(name: str, base: str, new: str) -> Change:
    """What is no number (a name, a version)."""
    return Change(name=name, base=base, new=new, judgement="unchanged" if base == new else "changed")


def exact(base: float, new: float) -> Interval | None:
    """Interval of a ratio without noise."""
    return Interval(new / base, new / base) if base else None


def within(base: float, new: float, noise: float) -> Interval:
    """Interval of new / base where two measurements of one quantity may differ by that relative noise."""
    return Interval(new / base / (1 + noise), new / base * (1 + noise))
