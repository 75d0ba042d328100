"""Stage time: seconds of one iteration of a node over a batch, as its ``StageCost`` says, and how they scatter."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping

from helixbench.profiler.cost.model import Counts, StageCost
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.scheduling.work import WorkItem


def count_item(counts: list[float], item: WorkItem) -> None:
    """Add what one sequence brings to an iteration to the ``Counts`` of the layer at which it enters."""
    tokens = item.num_tokens
    if item.is_decode:
        counts[3] += 1
        counts[4] += item.past + 1
        counts[5] += 1
    else:
        counts[0] += tokens
        counts[1] += 1
        counts[2] += tokens * (item.past + (tokens + 1) / 2)
        counts[5] += item.sample


def counts_by_entry(shape: Iterable[tuple[int, WorkItem]]) -> dict[int, list[float]]:
    """Entry layer -> ``Counts`` of what enters there, in the order of the layers, of items with their entry layers."""
    counts: dict[int, list[float]] = {}
    for entry, item in sorted(shape, key=lambda entering: entering[0]):
        count_item(counts.setdefault(entry, [0.0] * 6), item)
    return counts


class StageTimer:
    """Seconds of single iterations of one node, which scatter around what its cost says.

    The scatter is log-normal with the cost's ``variation``, the same for a seed: nodes that wait for each other lose
    throughput by it.

    Args:
        cost: of the node.
        held: its layers.
        num_layers: of the model.
        seed: of the scatter; another for each node.
    """

    def __init__(self, cost: StageCost, held: LayerRange, *, num_layers: int, seed: str = "") -> None:
        self._cost = cost
        self._sigma = math.sqrt(math.log1p(cost.variation**2))
        self._gauss = random.Random(seed).gauss
        self._end, self._is_last = held.end, held.end == num_layers

    def seconds(self, entries: Mapping[int, Counts]) -> float:
        """Seconds of an iteration over what enters at those layers, in ascending order."""
        seconds = self._cost.time_with_entries_s(entries, end=self._end, last=self._is_last)
        return seconds * self._scatter() if self._sigma else seconds

    def _scatter(self) -> float:
        """A factor with a mean of 1."""
        return math.exp(self._gauss(-(self._sigma**2) / 2, self._sigma))
