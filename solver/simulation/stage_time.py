"""Stage time: seconds of one iteration of a node over a batch, from the cluster profile.

A node with a measured cost takes ``StageCost`` at the batch's own shape. A node of which only a capacity table is known
gets the linear model of ``table_timing``, which says what it assumes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from helixbench.profiler.cluster import Node
from helixbench.profiler.cost.model import StageCost, gathered_tokens
from helixbench.solver.problem.capacity import Capacities, admitted_requests
from helixbench.solver.problem.plan import LayerRange

Counts: TypeAlias = tuple[float, float, float, float, float, float]
"""What enters a stage at one layer, as the first six fields of ``BatchShape`` count it."""

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

    As in ``solver.expected``, the capacity of ``k`` layers is taken as what ``L/k`` such nodes in a row carry with
    their KV caches as full as admission lets them be. That gives the full batch ``n(k)`` in tokens and by Little's law
    its time ``n(k) / T(k)``. Over ``k`` the batch shrinks (weights leave less room for KV cache), so the times of one
    layer, ``n(k) / T(k) / k``, show which share of a full iteration does not depend on its tokens: the intercept of a
    straight line through them, at the batch of the range held. Iterations hold at most ``n(k)`` tokens: a node never
    carries more than its table says.
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
    cost = StageCost(
        step_s=fixed * full_s,
        step_item_s=0.0,
        step_token_s=(1 - fixed) * full_s / full_tokens,
        layer_s=0.0,
        token_knots=(1.0,),
        layer_token_s=(0.0,),
        layer_decode_item_s=0.0,
        layer_decode_context_s=0.0,
        layer_prefill_chunk_s=0.0,
        layer_prefill_pair_s=0.0,
        embed_s=0.0,
        embed_token_s=0.0,
        head_s=0.0,
        head_item_s=0.0,
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
    """Share of a full iteration's time that does not depend on its tokens, from 0 to 1; 1 where nothing tells."""
    if len(points) < 2:
        return 1.0
    tokens, seconds = np.array(points).T
    if np.ptp(tokens) < 1e-9 * tokens.max():
        return 1.0
    slope, intercept = np.polyfit(tokens, seconds, 1)
    if slope <= 0:
        return 1.0
    return float(np.clip(intercept / (intercept + slope * full_tokens), 0.0, 1.0))


class StageTimer:
    """Seconds of an iteration of one node, as ``StageCost.time_s`` has them, quickly.

    A batch whose requests enter at several layers runs as the stage runs it: layer by layer with all that have entered.
    Single iterations scatter around their mean as the cost's ``variation`` says (log-normal, the same for a seed), for
    nodes that wait for each other lose by that.

    Args:
        cost: of the node.
        held: its layers.
        num_layers: of the model.
        seed: what the scatter is drawn from; another for each node.
    """

    def __init__(self, cost: StageCost, held: LayerRange, *, num_layers: int, seed: str = "") -> None:
        self._cost = cost
        self._sigma = math.sqrt(math.log1p(cost.variation**2))
        self._gauss = random.Random(seed).gauss
        self._end = held.end
        self._is_last = held.end == num_layers
        self._tokens_s: dict[float, float] = {}  # tokens of a batch -> their part of a layer's time

    def seconds(self, entries: Mapping[int, Sequence[float]]) -> float:
        """Seconds of an iteration over what enters at those layers, in the order of the layers."""
        cost = self._cost
        tokens = decodes = context = chunks = sampled = pairs = 0.0
        seconds, begin, layer_s = 0.0, self._end, 0.0
        for entry, (prefill, entering_chunks, entering_pairs, decoding, entering_context, sampling) in entries.items():
            seconds += max(0, entry - begin) * layer_s
            begin = entry
            entered = prefill + decoding
            chunks += entering_chunks
            pairs += entering_pairs
            decodes += decoding
            context += entering_context
            sampled += sampling
            tokens += entered
            if entry == 0:
                seconds += cost.embed_s + entered * cost.embed_token_s
            layer_s = (
                cost.layer_s
                + self._layer_tokens_s(tokens)
                + decodes * cost.layer_decode_item_s
                + context * cost.layer_decode_context_s
                + gathered_tokens(decodes, context, up_to=cost.gather_up_to_tokens) * cost.layer_gather_context_s
                + chunks * cost.layer_prefill_chunk_s
                + pairs * cost.layer_prefill_pair_s
            )
        seconds += (self._end - begin) * layer_s
        seconds += cost.step_s + (decodes + chunks) * cost.step_item_s + tokens * cost.step_token_s
        if self._is_last:
            seconds += cost.head_s + sampled * cost.head_item_s
        return seconds * self._scatter() if self._sigma else seconds

    def _scatter(self) -> float:
        """A factor with a mean of 1."""
        return math.exp(self._gauss(-(self._sigma**2) / 2, self._sigma))

    def _layer_tokens_s(self, tokens: float) -> float:
        known = self._tokens_s.get(tokens)
        if known is None:
            known = self._tokens_s[tokens] = self._cost.layer_tokens_s(tokens)
        return known
