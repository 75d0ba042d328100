"""Attempts at measuring one direction of a link: whether two of them agree, and on what rate. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from helixbench.profiler.cluster import MessageTime

AGREES_WITHIN = 0.1  # relative difference; below it two attempts confirm each other
_MBIT_PER_S = 1e6 / 8


def agreed_bytes_per_s(rates: Sequence[float]) -> float | None:
    """Mean of the two rates that are closest to each other; ``None`` until two agree."""
    pairs = [(abs(a - b) / (a + b), a, b) for a, b in itertools.combinations(rates, 2)]
    distance, first, second = min(pairs, default=(1.0, 0.0, 0.0))
    return (first + second) / 2 if 2 * distance <= AGREES_WITHIN else None


def disagreement(rates: Sequence[float], errors: Sequence[str]) -> str:
    """Why attempts gave no agreed rate: their rates, and the error of the last one that failed."""
    parts = []
    if rates:
        parts.append(f"attempts differ: {', '.join(f'{rate / _MBIT_PER_S:.4g}' for rate in rates)} Mbit/s")
    if errors:
        parts.append(f"{len(errors)} of {len(rates) + len(errors)} attempts failed: {errors[-1]}")
    return "; ".join(parts)


def rough_bytes_per_s(times: Sequence[MessageTime]) -> float | None:
    """Rate of the largest timed message: an estimate before bandwidth is measured."""
    largest = max(times, key=lambda time: time.message_bytes, default=None)
    return None if largest is None else largest.message_bytes / largest.one_way_s
