"""Confidence intervals: Student's t on repeats, on batch means of one run, and on paired log ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence

from helixbench.reports.verdict.verdict import Interval

CONFIDENCE = 0.95
# With fewer batches the t-interval is too wide to be useful; more batches hardly narrow it.
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
    """Two-sided quantile of Student's t: ``|t|`` exceeds it with probability ``1 - confidence``."""
    from scipy import stats  # takes half a second to import, and most commands do not need it

    return float(stats.t.ppf((1 + confidence) / 2, degrees))


def batch_means(values: Sequence[float], *, min_size: int) -> tuple[float, ...] | None:
    """Means of consecutive equal batches of a time series; a remainder at its start is dropped.

    Successive values of one run are correlated, so their variance underestimates the error of the mean; means of long
    batches are nearly independent. ``None`` if there are fewer than ``MIN_BATCHES`` batches of ``min_size`` values.
    """
    batches = min(MAX_BATCHES, len(values) // min_size)
    if batches < MIN_BATCHES:
        return None
    size = len(values) // batches
    used = values[len(values) - size * batches :]
    return tuple(math.fsum(used[i * size : (i + 1) * size]) / size for i in range(batches))
