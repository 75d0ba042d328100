"""How fast a processor is right now, and what a piece of work would have taken on it at another time. Pure.

A processor that others share (a virtual machine's neighbours, a sibling thread, a common cache and memory bus) changes
its speed within milliseconds, and not for all work alike. Two works that are timed again and again tell what an
iteration's seconds are worth: a few tokens times weights, which have to be streamed, and arithmetic in the cache.

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
_CACHED = 0.2
"""The power at which what arithmetic does not bound goes with arithmetic in the cache all the same (operations are
dispatched, for one), the rest of 1 being that of streaming. Iterations of 5 sequences had 0.57 and 0.22."""
_SENSITIVITY = 0.38
"""The power of both works' mean at which iterations slow down more than the works do, from one minute to another.

From what nodes took for a token, 368 of their runs in three suites, each against the mean of its node and load: 0.38
with a standard error of 0.03, and 0.28 to 0.52 by the nodes' share.
"""
FEW_TOKENS = 8
"""So many tokens cost a layer hardly more than one: its weights have to be read for either."""


class ProcessorSpeed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """CPU seconds of two works that are always the same.

    Attributes:
        weights_s: a few tokens times a weight matrix that is not in the cache.
        matmul_s: a matrix product in the cache, of ``MATMUL_FLOPS``.
    """

    weights_s: float
    matmul_s: float


def mean_speed(speeds: Sequence[ProcessorSpeed], *, last: int) -> ProcessorSpeed:
    """The mean of each of both works over the last runs; none of them counts for more than twice the median of all."""
    return ProcessorSpeed(
        weights_s=_capped_mean([speed.weights_s for speed in speeds], last=last),
        matmul_s=_capped_mean([speed.matmul_s for speed in speeds], last=last),
    )


def _capped_mean(times_s: Sequence[float], *, last: int) -> float:
    cap_s = _MOST * statistics.median(times_s)
    return statistics.fmean(min(time_s, cap_s) for time_s in times_s[-last:])


def seconds_at(
    nominal: ProcessorSpeed, *, now: ProcessorSpeed, lately: ProcessorSpeed, cpu_s: float, flops: float
) -> float:
    """What an iteration of ``cpu_s`` CPU seconds at the speed ``now`` takes at the ``nominal`` speed.

    What arithmetic bounds goes with the matrix product, all else with both as powers: each part by one factor, so that
    what was profiled and what is served stay comparable however well the nominal speed was caught. All of it goes with
    the speed of some seconds besides, for where the machine is slow iterations suffer more than the two works.

    Args:
        nominal: the speed that is asked for.
        now: the speed while the iteration ran.
        lately: the speed over more iterations than that.
        cpu_s: CPU seconds that it took.
        flops: operations in it that arithmetic bounds: those of the tokens beyond ``FEW_TOKENS``.
    """
    streaming, matmul = now.weights_s / nominal.weights_s, now.matmul_s / nominal.matmul_s
    arithmetic_s = min(cpu_s, flops / MATMUL_FLOPS * now.matmul_s)
    others = math.pow(streaming, 1 - _CACHED) * math.pow(matmul, _CACHED)
    as_the_works_s = arithmetic_s / matmul + (cpu_s - arithmetic_s) / others
    slower = math.sqrt(lately.weights_s / nominal.weights_s * lately.matmul_s / nominal.matmul_s)
    return as_the_works_s / math.pow(slower, _SENSITIVITY)
