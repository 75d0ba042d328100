"""Refinement: points added to the grid where the fit is worst, by bisection between measured neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from helixbench.profiler.cost.fit import relative_errors
from helixbench.profiler.cost.measured import CostSample, MeasuredCost
from helixbench.profiler.measure.grid import GridPoint

MISSED_BY = 0.05
"""Relative error of a sample above which its neighbourhood is bisected, if it also exceeds the noise."""
BEYOND_NOISE = 2.0
POINTS_A_TURN = 2
MAX_POINTS = 6


def points_to_add(
    points: Sequence[GridPoint], samples: Sequence[CostSample], cost: MeasuredCost, *, already_added: int
) -> tuple[GridPoint, ...]:
    """Batches halfway between neighbours for which the cost model's error exceeds the noise; the worst first.

    Only batches that differ in size alone are neighbours: decoding sequences of one context, or one prompt chunk
    without a past, on the same number of layers.

    Args:
        points: what was measured, in the order of ``samples``.
        samples: their times.
        cost: fitted to them.
        already_added: counts against ``MAX_POINTS``.
    """
    errors = dict(zip(points, relative_errors(cost.stage, samples), strict=True))
    noise = {point: sample.noise for point, sample in zip(points, samples, strict=True)}
    families: dict[tuple[object, ...], list[GridPoint]] = {}
    for point in points:
        if (family := _family(point)) is not None:
            families.setdefault(family, []).append(point)
    found: dict[GridPoint, float] = {}
    for members in families.values():
        for low, high in pairwise(sorted(members, key=lambda point: point.num_tokens)):
            missed = [point for point in (low, high) if errors[point] > max(MISSED_BY, BEYOND_NOISE * noise[point])]
            size = (low.num_tokens + high.num_tokens) // 2
            if missed and low.num_tokens < size < high.num_tokens:
                middle = _resized(low, size)
                found[middle] = max(found.get(middle, 0.0), *(float(errors[point]) for point in missed))
    worst = sorted(found, key=lambda point: -found[point])
    return tuple(worst[: max(0, min(POINTS_A_TURN, MAX_POINTS - already_added))])


def _family(point: GridPoint) -> tuple[object, ...] | None:
    if point.part != "layers":
        return None
    if not point.prefills and len(set(point.decodes)) == 1:
        return ("decode", point.num_layers, point.decodes[0])
    if not point.decodes and len(point.prefills) == 1 and point.prefills[0][0] == 0:
        return ("prefill", point.num_layers)
    return None


def _resized(point: GridPoint, size: int) -> GridPoint:
    """The same kind of batch of another size, in the fit."""
    if point.decodes:
        return GridPoint(part="layers", num_layers=point.num_layers, decodes=point.decodes[:1] * size)
    return GridPoint(part="layers", num_layers=point.num_layers, prefills=((0, size),))
