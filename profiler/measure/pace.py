"""What a piece of work that was timed at one speed of the processor takes at another. Pure.

How much an iteration suffers when the two reference works do depends on the machine and on what else slows it down, so
the profile measures it (``sensitivity``): with the powers of one machine another's were corrected too much by half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from helixbench.profiler.measure.processor_speed import MATMUL_FLOPS, ProcessorSpeed

FEW_TOKENS = 8
"""So many tokens cost a layer hardly more than one: its weights have to be read for either."""

MOST_POWER = 4.0  # a power beyond is none that a machine has


class Sensitivity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The powers at which CPU time goes with the times of the two reference works.

    Attributes:
        arithmetic_weights: of what arithmetic bounds, with the streaming of weights.
        arithmetic_matmul: of what arithmetic bounds, with the matrix product.
        other_weights: of all else, with the streaming of weights.
        other_matmul: of all else, with the matrix product.
    """

    arithmetic_weights: float
    arithmetic_matmul: float
    other_weights: float
    other_matmul: float

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not 0 <= getattr(self, name) <= MOST_POWER:
                raise ValueError(f"{name}: need a power from 0 to {MOST_POWER:g}, got {getattr(self, name)}")


USUAL = Sensitivity(arithmetic_weights=0.3, arithmetic_matmul=0.4, other_weights=0.55, other_matmul=0.2)
"""The mean of sixteen nodes (one Intel machine, shares of 0.1 to 0.9); on an AMD all else had 0.57 and 0.22."""


class Pace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The processor that a node stands in for a share of: its speed, and how iterations are brought to that."""

    speed: ProcessorSpeed
    sensitivity: Sensitivity


class PacedWork(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an iteration took, and how fast the processor was.

    Attributes:
        cpu_s: CPU seconds.
        arithmetic: the part of them that arithmetic bounds, 0 to 1.
        weights: time of streaming weights meanwhile, over that at the pace.
        matmul: time of the matrix product meanwhile, over that at the pace.
    """

    cpu_s: float
    arithmetic: float
    weights: float
    matmul: float


def paced_work(pace: ProcessorSpeed, *, now: ProcessorSpeed, cpu_s: float, flops: float) -> PacedWork:
    """An iteration as the sensitivity is applied to it.

    Args:
        pace: the speed that it is to be brought to.
        now: the speed while it ran.
        cpu_s: CPU seconds that it took.
        flops: operations in it that arithmetic bounds: those of the tokens beyond ``FEW_TOKENS``.
    """
    return PacedWork(
        cpu_s=cpu_s,
        arithmetic=min(1.0, flops / MATMUL_FLOPS * now.matmul_s / cpu_s) if cpu_s > 0 else 0.0,
        weights=now.weights_s / pace.weights_s,
        matmul=now.matmul_s / pace.matmul_s,
    )


def mean_work(works: Sequence[PacedWork]) -> PacedWork:
    """Of iterations of one batch: mean seconds and part, mean of the slowdowns' logarithms."""
    count = len(works)
    return PacedWork(
        cpu_s=sum(work.cpu_s for work in works) / count,
        arithmetic=sum(work.arithmetic for work in works) / count,
        weights=math.exp(sum(math.log(work.weights) for work in works) / count),
        matmul=math.exp(sum(math.log(work.matmul) for work in works) / count),
    )


def seconds_at_pace(work: PacedWork, sensitivity: Sensitivity) -> float:
    """What the work takes at the pace: each of its two parts by one factor.

    So what was profiled and what is served stay comparable however well the pace's own speed was caught.
    """
    arithmetic = math.pow(work.weights, sensitivity.arithmetic_weights) * math.pow(
        work.matmul, sensitivity.arithmetic_matmul
    )
    other = math.pow(work.weights, sensitivity.other_weights) * math.pow(work.matmul, sensitivity.other_matmul)
    return work.cpu_s * (work.arithmetic / arithmetic + (1 - work.arithmetic) / other)
