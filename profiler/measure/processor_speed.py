"""How fast a processor is right now: two works that are timed again and again. Pure.

A processor that others share (a virtual machine's neighbours, a sibling thread, a common cache and memory bus) changes
its speed within milliseconds, and not for all work alike. A few tokens times weights, which have to be streamed, and
arithmetic in the cache tell what an iteration's seconds are worth (``pace``).

When they run matters most. Where another core streams at the same time an iteration takes up to 1.7 times as long, so
they run before its layers; how much of its scatter that takes out, and how much less other ways do, stands in
docs/profile.md (Pacing).

One run in a hundred is three times as long as the others. An iteration lasts long enough to have its part of all kinds,
so what it is worth is told by a mean; a median jumps from one kind to the other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

MATMUL_FLOPS = 2 * 128**3
"""Floating-point operations of the matrix product that ``ProcessorSpeed.matmul_s`` is the time of."""

_MOST = 2.0  # times the median: what a run counts for at most


class ProcessorSpeed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """CPU seconds of two works that are always the same.

    Attributes:
        weights_s: a few tokens times a weight matrix that is not in the cache.
        matmul_s: a matrix product in the cache, of ``MATMUL_FLOPS``.
    """

    weights_s: float
    matmul_s: float

    def __post_init__(self) -> None:
        if not (0 < self.weights_s < math.inf and 0 < self.matmul_s < math.inf):
            raise ValueError(f"need times > 0 s, got {self.weights_s} and {self.matmul_s}")


def mean_speed(speeds: Sequence[ProcessorSpeed], *, last: int) -> ProcessorSpeed:
    """The mean of each of both works over the last runs; none of them counts for more than twice the median of all."""
    return ProcessorSpeed(
        weights_s=_capped_mean([speed.weights_s for speed in speeds], last=last),
        matmul_s=_capped_mean([speed.matmul_s for speed in speeds], last=last),
    )


def _capped_mean(times_s: Sequence[float], *, last: int) -> float:
    cap_s = _MOST * statistics.median(times_s)
    return statistics.fmean(min(time_s, cap_s) for time_s in times_s[-last:])
