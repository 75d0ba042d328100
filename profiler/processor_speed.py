"""How fast a processor is right now, and what a piece of work would have taken on it at another time. Pure.

A processor that others share (a virtual machine's neighbours, a sibling thread, a common cache and memory bus) changes
its speed from second to second, and not for all work alike. Two works that are timed again and again tell what an
iteration's seconds are worth: one that streams weights, one of arithmetic in the cache. Measured over 170 s on a
virtual machine with two cores, in spans of 4 s, as standard deviation of the logarithm: streaming 0.08 and 0.12,
arithmetic 0.03 and 0.05, iterations of 1 to 16 sequences 0.08 to 0.12, of a prompt of 99 tokens 0.05 and 0.07; the
iterations go with streaming: while a plan was served for 200 s (three nodes, 10 000 iterations of 2 and 3 sequences)
with slope 1.05 over spans of 2 s and 1.00 over 8 s; of 0.081 and 0.044 the correction leaves 0.034 and 0.017.

A run is either undisturbed or, where another core streams at the same time, 1.35 times as long, and one in a hundred is
three times as long. An iteration lasts long enough to have its part of both, so what it is worth is told by a mean; a
median jumps from one to the other, and says the same of a core that is disturbed 10 or 40 % of the time.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

MATMUL_FLOPS = 2 * 128**3
"""Floating-point operations of the matrix product that ``ProcessorSpeed.matmul_s`` is the time of."""

_MOST = 2.0  # times the median: what a run counts for at most
FEW_TOKENS = 8
"""So many tokens cost a layer hardly more than one: its weights have to be read for either."""


class ProcessorSpeed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """CPU seconds of two works that are always the same.

    Attributes:
        streaming_s: a few tokens times weights that are not in the cache.
        matmul_s: a matrix product in the cache, of ``MATMUL_FLOPS``.
    """

    streaming_s: float
    matmul_s: float


def mean_speed(speeds: Sequence[ProcessorSpeed], *, last: int) -> ProcessorSpeed:
    """The mean of each of both works over the last runs; none of them counts for more than twice the median of all."""
    return ProcessorSpeed(
        streaming_s=_capped_mean([speed.streaming_s for speed in speeds], last=last),
        matmul_s=_capped_mean([speed.matmul_s for speed in speeds], last=last),
    )


def _capped_mean(times_s: Sequence[float], *, last: int) -> float:
    cap_s = _MOST * statistics.median(times_s)
    return statistics.fmean(min(time_s, cap_s) for time_s in times_s[-last:])


def seconds_at(nominal: ProcessorSpeed, *, now: ProcessorSpeed, cpu_s: float, flops: float) -> float:
    """What an iteration of ``cpu_s`` CPU seconds at the speed ``now`` takes at the ``nominal`` speed.

    What arithmetic bounds goes with the matrix product, all else with streaming: each part by one factor, so that what
    was profiled and what is served stay comparable however well the nominal speed was caught.

    Args:
        nominal: the speed that is asked for.
        now: the speed while the iteration ran.
        cpu_s: CPU seconds that it took.
        flops: operations in it that arithmetic bounds: those of the tokens beyond ``FEW_TOKENS``.
    """
    streaming, matmul = now.streaming_s / nominal.streaming_s, now.matmul_s / nominal.matmul_s
    arithmetic_s = min(cpu_s, flops / MATMUL_FLOPS * now.matmul_s)
    return arithmetic_s / matmul + (cpu_s - arithmetic_s) / streaming
