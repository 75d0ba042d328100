"""Capacity: profile x workload x layer range -> tokens/s, KV cache, memory. The numbers on the arcs of every model.

A node with a measured cost is priced by it at the workload's mix of prompt and output tokens; a node with a capacity
table is taken at its word, for any range of that length.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np

from helixbench.profiler.cluster import ClusterProfile, ModelFacts, Node
from helixbench.profiler.cost.measured import MeasuredCost
from helixbench.profiler.cost.model import BatchShape, StageCost
from helixbench.solver.problem.links import LinkTable
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.problem.regions import inferred_regions
from helixbench.solver.problem.tables import table_cost
from helixbench.solver.problem.workload import Workload

TABLE_KV_SHARE = 0.8
"""Share of its KV cache that admission fills on a node with a capacity table; on a measured node it is all of it."""


@dataclass(frozen=True)
class RequestMix:
    """Means over a workload's requests, all that capacities depend on.

    Attributes:
        prompt_tokens: mean prompt length.
        output_tokens: mean output length.
        prompt_pairs: (query, key) pairs of a prompt's prefill.
        decode_context_tokens: cached tokens that all decode steps of a request read, summed.
        max_kv_tokens: KV cache of the longest request.
        mean_kv_tokens: KV cache that a request reserves, over requests as they arrive.
        held_kv_tokens: KV cache that a request reserves, over requests as they are met in flight, where those with a
            long output are met more often: ``E[out * (in + out)] / E[out]``.
    """

    prompt_tokens: float
    output_tokens: float
    prompt_pairs: float
    decode_context_tokens: float
    max_kv_tokens: int
    mean_kv_tokens: float
    held_kv_tokens: float

    @property
    def tokens_per_output(self) -> float:
        """Prompt and output tokens counted for each output token."""
        return 1.0 + self.prompt_tokens / self.output_tokens


def request_mix(workload: Workload) -> RequestMix:
    """The means of a workload, computed once."""
    pairs = np.array(workload.lengths, dtype=float)
    p, o = pairs[:, 0], pairs[:, 1]
    return RequestMix(
        prompt_tokens=workload.mean_prompt_tokens,
        output_tokens=workload.mean_output_tokens,
        prompt_pairs=float((p * (p + 1) / 2).mean()),
        decode_context_tokens=float(((o - 1) * p + o * (o - 1) / 2).mean()),
        max_kv_tokens=workload.max_kv_tokens,
        mean_kv_tokens=float((p + o).mean()),
        held_kv_tokens=float((o * (p + o)).mean() / o.mean()),
    )


def batch_shape(mix: RequestMix, sequences: float, *, max_batch_tokens: float) -> BatchShape:
    """The mean iteration of a node on which ``sequences`` requests take part in each iteration.

    A request takes part in ``o`` iterations: one that ends its prompt and yields the first output token, then ``o - 1``
    that decode. So each iteration carries ``1/o`` of every one's prompt.

    Args:
        mix: the workload.
        sequences: requests in an iteration, prefilling or decoding; may be a fraction.
        max_batch_tokens: the longest chunk of a prompt in one iteration.
    """
    requests = sequences / mix.output_tokens
    prefill_tokens = requests * mix.prompt_tokens
    return BatchShape(
        prefill_tokens=prefill_tokens,
        prefill_chunks=prefill_tokens / min(mix.prompt_tokens, max_batch_tokens),
        prefill_pairs=requests * mix.prompt_pairs,
        decode_tokens=requests * (mix.output_tokens - 1),
        decode_context_tokens=requests * mix.decode_context_tokens,
        sampled_tokens=sequences,
    )


def held_bytes(model: ModelFacts, node: Node, held: LayerRange) -> float:
    """Bytes of a node's memory that are not KV cache when it holds that range: weights, and measured workspace."""
    size = held.num_layers * model.layer_weight_bytes
    size += model.embedding_bytes * (held.start == 0) + model.head_bytes * (held.end == model.num_layers)
    return size + (node.cost.workspace_bytes if node.cost else 0.0)


def kv_capacity_tokens(model: ModelFacts, node: Node, held: LayerRange) -> int:
    """Tokens whose KV cache fits on the node beside that range; 0 where the weights alone fill it."""
    free = node.device.memory_bytes - held_bytes(model, node, held)
    return max(0, int(free // (held.num_layers * model.kv_bytes_per_token_per_layer)))


@dataclass(frozen=True)
class Rate:
    """Capacity at a batch: ``tokens_per_s`` (prompt + output) with ``sequences`` in each iteration of ``iteration_s``.

    ``sequences`` and ``iteration_s`` are ``None`` for a capacity table, which says neither.
    """

    tokens_per_s: float
    sequences: float | None = None
    iteration_s: float | None = None


class Capacities:
    """Capacity of every node of a profile for one workload with at most ``concurrency`` requests in flight.

    Nodes that differ only in name share one ``kind``. Everything is computed when first asked for, and kept.
    """

    def __init__(
        self,
        profile: ClusterProfile,
        workload: Workload,
        *,
        concurrency: int | None = None,
        pins: Mapping[str, LayerRange] | None = None,
        partial: bool = True,
        survive: int = 0,
    ) -> None:
        self.profile = profile
        self.survive = survive  # nodes, 0 or 1, that a placement has to be able to lose
        self.partial = partial  # whether a request may enter a range after its first layer
        self.links = LinkTable(profile)
        self.pins = dict(pins or {})  # node -> the only range that it may hold
        self.model = profile.model
        self.workload = workload
        self.mix = request_mix(workload)
        self.concurrency = concurrency
        self.nodes: dict[str, Node] = {node.name: node for node in profile.nodes}
        self._rates: dict[tuple[int, int, bool, bool, int], Rate] = {}  # (kind, held, first, last, run) -> rate
        self._kv: dict[tuple[int, int, bool, bool], int] = {}  # (kind, held, first, last) -> KV tokens
        self._table_costs: dict[tuple[int, int], StageCost] = {}  # (kind, held) -> stage times of a capacity table

    @cached_property
    def regions(self) -> dict[str, str]:
        """Node -> the region that its links put it in."""
        return inferred_regions(self.profile)

    @cached_property
    def exclusive_groups(self) -> dict[str, tuple[str, ...]]:
        """Group -> its nodes, of which a placement uses one at most; in order of the work that they can do, most first.

        That is layers times tokens/s with the range at which it is largest.
        """
        groups: dict[str, list[str]] = {}
        for node in self.profile.nodes:
            if node.exclusive_group:
                groups.setdefault(node.exclusive_group, []).append(node.name)
        return {group: tuple(sorted(names, key=self._work, reverse=True)) for group, names in groups.items()}

    def _work(self, name: str) -> float:
        lengths = range(1, self.max_layers(name) + 1)
        return max((k * self.tokens_per_s(name, held) for k in lengths for held in self.places(name, k)), default=0.0)

    def with_one_of_each_group(self) -> Capacities:
        """The same question without all but the first node of each exclusive group."""
        left_out = {name for names in self.exclusive_groups.values() for name in names[1:]}
        if not left_out:
            return self
        nodes = tuple(node for node in self.profile.nodes if node.name not in left_out)
        links = tuple(link for link in self.profile.links if not {link.src, link.dst} & left_out)
        return Capacities(
            msgspec.structs.replace(self.profile, nodes=nodes, links=links),
            self.workload,
            concurrency=self.concurrency,
            pins={name: held for name, held in self.pins.items() if name not in left_out},
            partial=self.partial,
            survive=self.survive,
        )

    @cached_property
    def _kinds(self) -> dict[str, int]:
        """Node -> number of its kind."""
        known: dict[Hashable, int] = {}
        return {
            node.name: known.setdefault(
                (_kind_key(node), self.regions[node.name], node.name if node.name in self.pins else ""), len(known)
            )
            for node in self.profile.nodes
        }

    def kind(self, name: str) -> int:
        """The node's kind: equal for nodes that differ only in name and in their own links inside their region."""
        return self._kinds[name]

    def is_measured(self, name: str) -> bool:
        """Whether the node has a measured cost; else it has a capacity table, the same for every entry."""
        return self.nodes[name].cost is not None

    def stage_cost(self, name: str, held: LayerRange) -> StageCost:
        """Stage times with that range held: as measured, or as ``tables`` reads the capacity table."""
        node = self.nodes[name]
        if node.cost is not None:
            return node.cost.stage
        key = (self._kinds[name], held.num_layers)
        if key not in self._table_costs:
            assert node.capacity_tokens_per_s is not None, "a node has a cost or a table"
            self._table_costs[key] = table_cost(node.capacity_tokens_per_s, held.num_layers)
        return self._table_costs[key]

    def max_batch_tokens(self, name: str, held: LayerRange) -> int:
        """Tokens of the node's largest iteration with that range held: the most measured, or a table's usual batch."""
        cost = self.nodes[name].cost
        return int(self.stage_cost(name, held).max_tokens) if cost is None else cost.max_batch_tokens

    def mixes_entries(self, name: str) -> bool:
        """Whether requests that enter the node at different layers take different shares of its time."""
        return self.partial and self.is_measured(name)

    def entries(self, held: LayerRange) -> Sequence[int]:
        """The layers of a range where requests may enter."""
        return range(held.start, held.end) if self.partial else (held.start,)

    def kv_tokens(self, name: str, held: LayerRange) -> int:
        """Tokens whose KV cache fits beside that range."""
        key = (self._kinds[name], held.num_layers, held.start == 0, held.end == self.model.num_layers)
        if key not in self._kv:
            self._kv[key] = kv_capacity_tokens(self.model, self.nodes[name], held)
        return self._kv[key]

    def admission_share(self, name: str) -> float:
        """Share of the node's KV cache that admission fills."""
        return 1.0 if self.is_measured(name) else TABLE_KV_SHARE

    def kv_slots(self, name: str, held: LayerRange, *, kv_tokens: int | None = None, share: float | None = None) -> int:
        """KV slots that admission fills: ``share`` of ``kv_tokens``, by default of all that fits beside that range."""
        capacity = self.kv_tokens(name, held) if kv_tokens is None else kv_tokens
        return int(capacity * (self.admission_share(name) if share is None else share))

    def can_hold(self, name: str, held: LayerRange) -> bool:
        """Whether the node can hold that range and still serve the workload's longest request.

        A capacity table comes with its own ``max_layers`` and is taken at its word.
        """
        node = self.nodes[name]
        if held.num_layers > node.max_layers or held.end > self.model.num_layers:
            return False
        if name in self.pins and held != self.pins[name]:
            return False
        return node.cost is None or self.kv_tokens(name, held) >= self.mix.max_kv_tokens

    def middle(self, length: int) -> LayerRange:
        """A range of that many layers that holds neither embedding nor head, where there is one."""
        start = min(1, self.model.num_layers - length)
        return LayerRange(start, start + length)

    def places(self, name: str, length: int) -> list[LayerRange]:
        """Ranges of that many layers that the node can hold, one of each sort: with the embedding, the head, neither.

        Ranges of one sort have one capacity. A pinned node has its pin alone.
        """
        last = self.model.num_layers - length
        pin = self.pins.get(name)
        starts = {0, min(1, last), last} if pin is None else {pin.start}
        ranges = [LayerRange(start, start + length) for start in sorted(starts) if 0 <= start <= last]
        return [held for held in ranges if self.can_hold(name, held)]

    def max_layers(self, name: str) -> int:
        """The longest range that the node can hold anywhere in the model; 0 where it can hold none."""
        longest = min(self.nodes[name].max_layers, self.model.num_layers)
        return next((length for length in range(longest, 0, -1) if self.places(name, length)), 0)

    def rate(self, name: str, held: LayerRange, entry: int | None = None) -> Rate:
        """Capacity of the node, holding ``held``, for requests that enter at layer ``entry`` (default: its start)."""
        node = self.nodes[name]
        if node.capacity_tokens_per_s is not None:
            return Rate(tokens_per_s=node.capacity_tokens_per_s[held.num_layers - 1])
        run = held.num_layers if entry is None else held.end - entry
        first, last = held.start == 0, held.end == self.model.num_layers
        key = (self._kinds[name], held.num_layers, first, last, run)
        if key not in self._rates:
            self._rates[key] = self._measured_rate(name, held, run)
        return self._rates[key]

    def tokens_per_s(self, name: str, held: LayerRange, entry: int | None = None) -> float:
        """Tokens/s of ``rate``."""
        return self.rate(name, held, entry).tokens_per_s

    def _measured_rate(self, name: str, held: LayerRange, run: int) -> Rate:
        cost = self.nodes[name].cost
        assert cost is not None, "only for nodes with a measured cost"
        first = held.start == 0 and run == held.num_layers
        last = held.end == self.model.num_layers
        most = self.kv_tokens(name, held) / self.mix.mean_kv_tokens
        if self.concurrency is not None:
            most = min(most, self.concurrency)
        return best_rate(cost, self.mix, run, first=first, last=last, max_sequences=most)


def admitted_requests(capacities: Capacities, name: str, held: LayerRange) -> float:
    """Requests in flight whose KV cache a node admits beside a range."""
    return capacities.admission_share(name) * capacities.kv_tokens(name, held) / capacities.mix.held_kv_tokens


def best_rate(
    cost: MeasuredCost, mix: RequestMix, num_layers: int, *, first: bool, last: bool, max_sequences: float
) -> Rate:
    """The best capacity of a stage over all batches of at most ``max_sequences`` sequences.

    Between two knots of the cost model time is a straight line over the batch, and tokens over time is monotone there:
    the best batch is at a knot or at the limit.
    """
    tokens_per_sequence = batch_shape(mix, 1.0, max_batch_tokens=cost.max_batch_tokens).tokens
    limit = min(max_sequences, cost.max_batch_tokens / tokens_per_sequence)
    if limit <= 0:
        return Rate(tokens_per_s=0.0)
    knots = [tokens / tokens_per_sequence for tokens in cost.stage.token_knots]
    best = Rate(tokens_per_s=0.0)
    for sequences in [*(sequences for sequences in knots if sequences < limit), limit]:
        shape = batch_shape(mix, sequences, max_batch_tokens=cost.max_batch_tokens)
        seconds = cost.stage.time_s(num_layers=num_layers, batch=shape, first=first, last=last)
        counted = sequences * mix.tokens_per_output
        if seconds > 0 and counted / seconds > best.tokens_per_s:
            best = Rate(tokens_per_s=counted / seconds, sequences=sequences, iteration_s=seconds)
    return best


def _kind_key(node: Node) -> Hashable:
    if node.cost is not None:
        # Two measurements never agree to the last digit, so each measured node is a kind of its own unless it is
        # literally the same record under another name.
        measured: Hashable = (node.cost.stage, node.cost.workspace_bytes, node.cost.max_batch_tokens)
    else:
        measured = node.capacity_tokens_per_s
    return (
        measured,
        node.device.memory_bytes,
        node.device.kind,
        node.device.name,
        node.max_layers,
        node.exclusive_group,
        node.nic_out_bytes_per_s,
        node.nic_in_bytes_per_s,
    )
