"""Stage time: seconds of one iteration of a node over a batch, from the cluster profile.

A node with a measured cost takes what its ``StageCost`` says of the batch. A node that has only a capacity table gets
the linear model of ``table_timing``, which states its assumptions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from helixbench.profiler.cluster import Node
from helixbench.profiler.cost.model import Counts, StageCost
from helixbench.solver.problem.capacity import Capacities, admitted_requests
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.scheduling.work import WorkItem

TABLE_NOTE = (
    "nodes with only a capacity table: an iteration takes a fixed part and a part in proportion to its tokens, so that "
    "the largest batch gives the table's tokens/s; the batch and the parts follow from how the table falls with the "
    "layers held; admission fills 80 % of its KV cache unless told otherwise (docs/design/two-numbers.md)"
)


@dataclass(frozen=True)
class StageTiming:
    """How long a node's iterations take and how many tokens fit in one."""

    cost: StageCost
    max_batch_tokens: int


def timing_of(capacities: Capacities, node: Node, held: LayerRange) -> StageTiming:
    """The node's timing with that range held."""
    if node.cost is not None:
        return StageTiming(node.cost.stage, node.cost.max_batch_tokens)
    return table_timing(capacities, node.name, held)


def table_timing(capacities: Capacities, name: str, held: LayerRange) -> StageTiming:
    """The linear model of a node that has only a capacity table.

    The capacity of ``k`` layers is taken as what ``L/k`` such nodes in a row carry with their KV caches as full as
    admission lets them be. That gives the full batch ``n(k)`` in tokens and by Little's law its time ``n(k) / T(k)``.
    Over ``k`` the batch shrinks (weights leave less room for KV cache), so the times of one layer, ``n(k) / T(k) / k``,
    show which share of a full iteration does not depend on its tokens: the intercept of a straight line through them,
    at the batch of the range held. Iterations hold at most ``n(k)`` tokens: a node never carries more than its table
    says.
    """
    node = capacities.nodes[name]
    per_output = capacities.mix.tokens_per_output
    points = []  # (tokens of a full batch, seconds of a layer over it) for each number of layers held
    for k in range(1, node.max_layers + 1):
        of = LayerRange(0, k)
        if admitted_requests(capacities, name, of) > 0:
            tokens = _sequences(capacities, name, of) * per_output
            points.append((tokens, table_round_s(capacities, name, of) / k))
    full_s = table_round_s(capacities, name, held)
    full_tokens = max(1.0, _sequences(capacities, name, held) * per_output)
    fixed = _fixed_share(points, full_tokens)
    cost = StageCost.with_zeros(
        step_s=fixed * full_s,
        step_token_s=(1 - fixed) * full_s / full_tokens,
        max_tokens=full_tokens,
        max_context_tokens=float(capacities.mix.max_kv_tokens),
    )
    return StageTiming(cost, max(1, int(full_tokens)))


def table_round_s(capacities: Capacities, name: str, held: LayerRange) -> float:
    """Seconds that a token spends in a round at a node that has only a capacity table.

    The capacity of ``k`` layers is taken as what ``L/k`` such nodes in a row carry with their KV caches as full as
    admission lets them be: of the requests that the cache holds, ``k/L`` are then at the node, and Little's law gives
    the time of each.
    """
    return _sequences(capacities, name, held) * capacities.mix.tokens_per_output / capacities.tokens_per_s(name, held)


def _sequences(capacities: Capacities, name: str, held: LayerRange) -> float:
    """Sequences at the node at once where its KV cache is as full as admission lets it be."""
    here = admitted_requests(capacities, name, held) * held.num_layers / capacities.model.num_layers
    return max(1.0, here)


def _fixed_share(points: Sequence[tuple[float, float]], full_tokens: float) -> float:
    """Share of a full iteration's time that does not depend on its tokens, from 0 to 1; 1 where it is not known."""
    if len(points) < 2:
        return 1.0
    tokens, seconds = np.array(points).T
    if np.ptp(tokens) < 1e-9 * tokens.max():
        return 1.0
    slope, intercept = np.polyfit(tokens, seconds, 1)
    if slope <= 0:
        return 1.0
    return float(np.clip(intercept / (intercept + slope * full_tokens), 0.0, 1.0))


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
