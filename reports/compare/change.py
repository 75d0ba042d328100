"""What a comparison of two records consists of: changes, each judged against the noise that is known of it."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Literal

import msgspec

from helixbench.reports.formatting import number, seconds
from helixbench.reports.verdict.verdict import Interval

# Ratios nearer to 1 than this are rounding.
EXACT = 1e-9


class Judgement(StrEnum):
    """How a quantity changed, the most important first.

    ``CHANGED`` is a change whose noise is unknown, or that is neither better nor worse.
    """

    WORSE = "worse"
    BETTER = "better"
    WITHIN_NOISE = "within noise"
    CHANGED = "changed"
    UNCHANGED = "unchanged"


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One quantity in both records as text and, if it is a number, new / base with its interval."""

    name: str
    base: str
    new: str
    judgement: Judgement
    ratio: float | None = None
    interval: Interval | None = None


class Comparison(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.comparison/1",
):
    """Everything that was compared; ``notes`` say what limits the comparison."""

    kind: Literal["cluster", "plan", "run"]
    base: str
    new: str
    notes: tuple[str, ...]
    changes: tuple[Change, ...]

    @property
    def headline(self) -> str:
        """``2 worse, 1 better, 4 changed``."""
        counts = Counter(change.judgement for change in self.changes)
        parts = [f"{counts[j]} {j}" for j in (Judgement.WORSE, Judgement.BETTER) if counts[j]]
        if not parts and counts[Judgement.WITHIN_NOISE]:
            parts = ["nothing beyond noise"]
        if counts[Judgement.CHANGED]:
            parts.append(f"{counts[Judgement.CHANGED]} changed")
        return ", ".join(parts) or "nothing changed"

    def changed(self) -> list[Change]:
        """Every change but ``UNCHANGED``, in the order of ``Judgement``."""
        order = list(Judgement)
        changes = [change for change in self.changes if change.judgement is not Judgement.UNCHANGED]
        return sorted(changes, key=lambda change: order.index(change.judgement))


def quantity(
    name: str,
    base: float,
    new: float,
    *,
    is_higher_better: bool,
    interval: Interval | None = None,
    texts: tuple[str, str] | None = None,
) -> Change:
    """A number in both records.

    Args:
        name: ends in the unit, where ``texts`` do not give one.
        base: value in the base record.
        new: value in the new record.
        is_higher_better: the direction that is better.
        interval: what new / base may be, given the noise of both; ``None`` if that is unknown.
        texts: both values as text.
    """
    is_time = name.endswith("_s") and "per_s" not in name
    of_base, of_new = texts or ((seconds(base), seconds(new)) if is_time else (number(base), number(new)))
    ratio = new / base if base else None
    if (ratio is None and new == base) or (ratio is not None and abs(ratio - 1) <= EXACT):
        judgement = Judgement.UNCHANGED
    elif interval is None:
        judgement = Judgement.CHANGED
    elif interval.low <= 1 <= interval.high:
        judgement = Judgement.WITHIN_NOISE
    else:
        judgement = Judgement.BETTER if (interval.low > 1) == is_higher_better else Judgement.WORSE
    return Change(name=name, base=of_base, new=of_new, judgement=judgement, ratio=ratio, interval=interval)


def computed(name: str, base: float, new: float) -> Change:
    """A number without noise, of which more is better."""
    interval = Interval(new / base, new / base) if base else None
    return quantity(name, base, new, is_higher_better=True, interval=interval)


def statement(name: str, base: object, new: object) -> Change:
    """Something that is not a number: a device, a version, a range of layers."""
    judgement = Judgement.UNCHANGED if base == new else Judgement.CHANGED
    return Change(name=name, base=_text(base), new=_text(new), judgement=judgement)


def _text(value: object) -> str:
    if value is None or value == "":
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
