"""Intervals from repeated measurements: Student's t on means, on batch means of one run and on paired log ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence

from helixbench.reports.verdict.verdict import Interval

CONFIDENCE = 0.95
# Fewer batches give a t-interval too wide to say anything; many more say nothing new.
MIN_BATCHES, MAX_BATCHES = 4, 20


def mean_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval | None:
    """Two-sided t-interval of the mean of independent values; ``None`` below two values."""
    half = half_width(values, confidence=confidence)
    if half is None:
        return None
    center = math.fsum(values) / len(values)
    return Interval(center - half, center + half)


def half_width(values: Sequence[float], *, confidence: float = CONFIDENCE) -> float | None:
    """Half the width of ``mean_interval``; ``None`` below two values."""
    n = len(values)
    if n < 2:
        return None
    center = math.fsum(values) / n
    variance = math.fsum((value - center) ** 2 for value in values) / (n - 1)
    return t_quantile(n - 1, confidence=confidence) * math.sqrt(variance / n)


def t_quantile(degrees: int, *, confidence: float = CONFIDENCE) -> float:
    """The value that Student's t exceeds in absolute value with probability ``1 - confidence``."""
    from scipy import stats  # imported here: half a second that most commands do not need

    return float(stats.t.ppf((1 + confidence) / 2, degrees))


def batch_means(values: Sequence[float], *, min_size: int) -> tuple[float, ...] | None:
    """Means of consecutive equal batches of a time series; the rest at its start is left out.

    Successive values of one run depend on each other, so their own spread says too little; means of batches long enough
    nearly do not. ``None`` where there are not ``MIN_BATCHES`` batches of ``min_size`` values.
    """
    batches = min(MAX_BATCHES, len(values) // min_size)
    if batches < MIN_BATCHES:
        return None
    size = len(values) // batches
    used = values[len(values) - size * batches :]
    return tuple(math.fsum(used[i * size : (i + 1) * size]) / size for i in range(batches))
