"""What a plan of measured nodes will deliver, by rolling it forward: requests in a closed loop, iteration by iteration.

Batches are not means. What leaves a node together arrives together, waits together and is batched together again, so
requests travel in groups whose number and sizes decide how often the fixed part of an iteration is paid. No formula in
means alone gives these groups; following them does, with stage times from the fitted cost and none from the run that is
predicted.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from profiler.cluster_profile import COORDINATOR, ClusterProfile, MeasuredCost
from profiler.cost import IDLE_S, BatchShape

from .network import LinkTable
from .plan import Expected, LayerRange, LinkFlow
from .routes import Pipeline, pipelines_of
from .workload import Workload

WAIT_SHARE = 0.1
"""Of an iteration: how long a node that holds the whole model waits for its last batch to come back."""

MIN_REQUESTS = 96
MIN_ROUNDS = 4
"""The window holds this many requests, or so many rounds of all that are in flight: the larger of the two."""


def can_roll_out(profile: ClusterProfile, placement: Mapping[str, LayerRange]) -> bool:
    """Whether every node of the placement has a measured cost."""
    return all(profile.node(name).cost is not None for name in placement)


def roll_out(
    profile: ClusterProfile,
    placement: Mapping[str, LayerRange],
    flows: Sequence[LinkFlow],
    workload: Workload,
    concurrency: int | None,
    *,
    kv_capacity_tokens: Mapping[str, int],
    max_decode_batch: int | None = None,
    max_batch_tokens: int | None = None,
    rounds: int = MIN_ROUNDS,
    seed: int = 0,
) -> Expected:
    """Expected throughput and latency in a closed loop.

    Args:
        profile: the cluster; every node of the placement has a measured cost.
        placement: node -> layer range.
        flows: what routing follows.
        workload: lengths of requests, drawn at random.
        concurrency: requests in flight; ``None`` for as many as the KV caches hold.
        kv_capacity_tokens: node -> KV tokens that it holds.
        max_decode_batch: decoding sequences in an iteration at most; ``None`` for no such limit.
        max_batch_tokens: tokens in an iteration at most; ``None`` for what each node can do.
        rounds: of all requests in flight that the window holds at least.
        seed: of the draws.
    """
    rollout = _Rollout(
        profile,
        placement,
        pipelines_of(placement, flows),
        workload,
        kv_capacity_tokens=kv_capacity_tokens,
        max_decode_batch=max_decode_batch,
        max_batch_tokens=max_batch_tokens,
        seed=seed,
    )
    return rollout.run(concurrency, rounds=rounds)


@dataclass
class _Request:
    prompt_tokens: int
    output_tokens: int
    pipeline: int
    arrival_s: float
    first_token_s: float = -1.0
    produced: int = 0


@dataclass
class _Item:
    """New tokens of a request at hop ``hop``; ``taken`` of them have run there."""

    request: _Request
    hop: int
    past: int
    num_tokens: int
    is_decode: bool
    sample: bool = True
    taken: int = 0


@dataclass
class _Node:
    cost: MeasuredCost
    held: LayerRange
    is_last: bool
    decodes: deque[_Item] = field(default_factory=deque)
    prefills: deque[_Item] = field(default_factory=deque)
    is_busy: bool = False
    ended_s: float = 0.0  # when the last iteration ended
    busy_s: float = 0.0
    iterations: int = 0
    decoded: int = 0
    returning: set[int] = field(default_factory=set)  # requests whose next token comes straight back
    wait_until_s: float = 0.0  # and until when they are waited for


class _Rollout:
    def __init__(
        self,
        profile: ClusterProfile,
        placement: Mapping[str, LayerRange],
        weighted: Sequence[tuple[Pipeline, float]],
        workload: Workload,
        *,
        kv_capacity_tokens: Mapping[str, int],
        max_decode_batch: int | None,
        max_batch_tokens: int | None,
        seed: int,
    ) -> None:
        self._max_decode_batch = max_decode_batch
        self._max_batch_tokens = max_batch_tokens
        self._links = LinkTable(profile)
        self._profile = profile
        self._pipelines = [pipeline for pipeline, _ in weighted]
        total = sum(weight for _, weight in weighted)
        self._shares = [weight / total for _, weight in weighted]
        self._credits = [0.0] * len(weighted)
        self._workload = workload
        self._random = random.Random(seed)
        self._kv_free = {name: kv_capacity_tokens[name] for name in placement}
        self._nodes: dict[str, _Node] = {}
        for name, held in placement.items():
            cost = profile.node(name).cost
            assert cost is not None, "a node without a measured cost"
            self._nodes[name] = _Node(cost, held, held.end == profile.model.num_layers)
        self._nic = {COORDINATOR: (profile.coordinator.nic_out_bytes_per_s, profile.coordinator.nic_in_bytes_per_s)}
        self._nic |= {node.name: (node.nic_out_bytes_per_s, node.nic_in_bytes_per_s) for node in profile.nodes}
        self._free_at: dict[tuple[str, str], float] = {}  # link, or (node, "out") or ("in", node) -> when it is free
        self._coordinator_free_s = 0.0
        self._events: list[tuple[float, int, str, list[_Item]]] = []  # (when, order of making, where, what)
        self._order = itertools.count()
        self._now = 0.0
        self._in_flight = 0
        self._next_lengths = self._draw_lengths()
        self.finished: list[_Request] = []
        self._tokens = 0  # prompt and output tokens counted so far
        self._outputs = 0
        self._ttft_s: list[float] = []
        self._tpot_s: list[float] = []

    def run(self, concurrency: int | None, *, rounds: int) -> Expected:
        """Fill the cluster, let every one of the first requests finish, then count over a window."""
        self._limit = concurrency
        first: dict[str, list[_Item]] = {}
        self._admit(first)
        self._send(first)
        started = self._in_flight
        self._advance_until(started)
        begin = (self._now, self._tokens, self._outputs)
        nodes = {n: (v.busy_s, v.iterations, v.decoded) for n, v in self._nodes.items()}
        self._ttft_s, self._tpot_s = [], []
        self._advance_until(len(self.finished) + max(rounds * started, MIN_REQUESTS))
        seconds = self._now - begin[0]
        total = (self._tokens - begin[1]) / seconds
        error = max(node.cost.held_out_error_median for node in self._nodes.values())
        return Expected(
            concurrency=started if concurrency is None else concurrency,
            total_tokens_per_s=total,
            output_tokens_per_s=(self._outputs - begin[2]) / seconds,
            ttft_s=_median(self._ttft_s),
            tpot_s=_median(self._tpot_s),
            low_total_tokens_per_s=total / (1 + error),
            high_total_tokens_per_s=total / max(1e-6, 1 - error),
            in_flight=float(started),
            node_busy={n: min(1.0, (v.busy_s - nodes[n][0]) / seconds) for n, v in self._nodes.items()},
            node_batch_tokens={
                n: (v.decoded - nodes[n][2]) / max(1, v.iterations - nodes[n][1]) for n, v in self._nodes.items()
            },
        )

    def _advance_until(self, num_finished: int) -> None:
        while len(self.finished) < num_finished:
            self._now, _, where, items = heapq.heappop(self._events)
            if where == COORDINATOR:
                self._sampled(items)
            elif where.startswith("end of "):
                self._end_iteration(where.removeprefix("end of "), items)
            elif where.startswith("wait at "):
                self._begin_if_idle(where.removeprefix("wait at "))
            else:
                self._arrive(where, items)

    def _at(self, when: float, where: str, items: list[_Item]) -> None:
        heapq.heappush(self._events, (when, next(self._order), where, items))

    def _draw_lengths(self) -> tuple[int, int]:
        return self._random.choice(self._workload.lengths)

    def _admit(self, starting: dict[str, list[_Item]]) -> None:
        """Let requests in while there is room, each on the pipeline that is owed the most (IWRR), onto ``starting``."""
        while self._limit is None or self._in_flight < self._limit:
            prompt_tokens, output_tokens = self._next_lengths
            need = prompt_tokens + output_tokens - 1
            fitting = [
                index
                for index, hops in enumerate(self._pipelines)
                if all(self._kv_free[name] >= need for name, _, _ in hops)
            ]
            if not fitting:
                break
            for index, share in enumerate(self._shares):
                self._credits[index] += share
            chosen = max(fitting, key=lambda index: (self._credits[index], -index))
            self._credits[chosen] -= 1.0
            for name, _, _ in self._pipelines[chosen]:
                self._kv_free[name] -= need
            self._in_flight += 1
            request = _Request(prompt_tokens, output_tokens, chosen, self._now)
            first = self._pipelines[chosen][0][0]
            starting.setdefault(first, []).append(_Item(request, 0, 0, prompt_tokens, is_decode=False))
            self._next_lengths = self._draw_lengths()

    def _send(self, messages: dict[str, list[_Item]]) -> None:
        """The coordinator sends each first node one message: tokens that go on and prompts that begin go together."""
        for name, items in messages.items():
            self._transmit(COORDINATOR, name, items)

    def _transmit(self, src: str, dst: str, items: list[_Item]) -> None:
        """One message: its bytes pass the sender's card, the link and the receiver's card, each one at a time."""
        size = sum(item.num_tokens for item in items) * self._profile.bytes_per_token(src, dst)
        bandwidth, latency_s = self._links.bandwidth(src, dst), self._links.latency_s(src, dst)
        assert bandwidth is not None
        assert latency_s is not None
        at = self._now
        ways = (((src, "out"), self._nic[src][0]), ((src, dst), bandwidth), (("in", dst), self._nic[dst][1]))
        for way, rate in ways:
            if rate is not None:
                at = max(at, self._free_at.get(way, 0.0))
                self._free_at[way] = at + size / rate
        slowest = min(rate for _, rate in ways if rate is not None)
        self._at(at + size / slowest + latency_s, dst, items)

    def _arrive(self, name: str, items: list[_Item]) -> None:
        node = self._nodes[name]
        for item in items:
            node.returning.discard(id(item.request))
            (node.decodes if item.is_decode else node.prefills).append(item)
        self._begin_if_idle(name)

    def _begin_if_idle(self, name: str) -> None:
        """Begin an iteration where there is work, unless the last batch is still coming back (and not over-due)."""
        node = self._nodes[name]
        if self._now >= node.wait_until_s:
            node.returning.clear()
        if not node.is_busy and not node.returning and (node.decodes or node.prefills):
            self._begin_iteration(name, node)

    def _begin_iteration(self, name: str, node: _Node) -> None:
        batch = _next_batch(node, self._max_decode_batch, self._max_batch_tokens)
        seconds = self._iteration_s(node, batch, after_idle=min(1.0, (self._now - node.ended_s) / IDLE_S))
        node.is_busy = True
        node.busy_s += seconds
        node.iterations += 1
        node.decoded += sum(1 for item in batch if item.is_decode)
        self._at(self._now + seconds, f"end of {name}", batch)

    def _end_iteration(self, name: str, batch: list[_Item]) -> None:
        node = self._nodes[name]
        node.is_busy, node.ended_s = False, self._now
        going: dict[str, list[_Item]] = {}
        for item in batch:
            hops = self._pipelines[item.request.pipeline]
            if item.hop + 1 < len(hops):
                onward = _Item(item.request, item.hop + 1, item.past, item.num_tokens, item.is_decode, item.sample)
                going.setdefault(hops[onward.hop][0], []).append(onward)
            elif item.sample:
                going.setdefault(COORDINATOR, []).append(_Item(item.request, 0, 0, 1, item.is_decode))
        for dst, items in going.items():
            self._transmit(name, dst, items)
        alone = [item for item in batch if item.sample and len(self._pipelines[item.request.pipeline]) == 1]
        if alone:
            node.returning = {id(item.request) for item in alone}
            node.wait_until_s = self._now + WAIT_SHARE * self._iteration_s(node, batch)
            self._at(node.wait_until_s, f"wait at {name}", [])
        self._begin_if_idle(name)

    def _iteration_s(self, node: _Node, batch: list[_Item], *, after_idle: float = 0.0) -> float:
        """Seconds of one iteration; items that enter late run fewer layers: each entry's time counts by its share."""
        by_entry: dict[int, list[_Item]] = {}
        for item in batch:
            entry = self._pipelines[item.request.pipeline][item.hop][1]
            by_entry.setdefault(entry, []).append(item)
        shape = _shape(batch, after_idle=after_idle)
        return sum(
            sum(item.num_tokens for item in items)
            / shape.tokens
            * node.cost.stage.time_s(num_layers=node.held.end - entry, batch=shape, first=entry == 0, last=node.is_last)
            for entry, items in by_entry.items()
        )

    def _sampled(self, items: list[_Item]) -> None:
        """The coordinator takes a message: counts, ends, admits, and sends the next tokens on their way."""
        times = self._profile.coordinator
        ended = [item for item in items if item.request.produced + 1 == item.request.output_tokens]
        work_s = (times.message_s or 0.0) + len(items) * (times.token_s or 0.0)
        work_s += len(ended) * (times.request_s or 0.0)
        self._now = max(self._now, self._coordinator_free_s) + work_s
        self._coordinator_free_s = self._now
        again: dict[str, list[_Item]] = {}
        for item in items:
            self._count(item.request)
            if item.request.produced < item.request.output_tokens:
                first = self._pipelines[item.request.pipeline][0][0]
                past = item.request.prompt_tokens + item.request.produced - 1
                again.setdefault(first, []).append(_Item(item.request, 0, past, 1, is_decode=True))
        self._admit(again)
        self._send(again)

    def _count(self, request: _Request) -> None:
        request.produced += 1
        self._tokens += 1
        self._outputs += 1
        if request.produced == 1:
            request.first_token_s = self._now
            self._tokens += request.prompt_tokens
        if request.produced == request.output_tokens:
            self.finished.append(request)
            self._in_flight -= 1
            for name, _, _ in self._pipelines[request.pipeline]:
                self._nodes[name].returning.discard(id(request))
                self._kv_free[name] += request.prompt_tokens + request.output_tokens - 1
            self._ttft_s.append(request.first_token_s - request.arrival_s)
            if request.produced > 1:
                self._tpot_s.append((self._now - request.first_token_s) / (request.produced - 1))


def _next_batch(node: _Node, max_decode_batch: int | None, max_batch_tokens: int | None) -> list[_Item]:
    """The server's rule: decoding sequences first, then prompts as they came, the last cut where the batch is full."""
    batch: list[_Item] = []
    room = min(node.cost.max_batch_tokens, max_batch_tokens or node.cost.max_batch_tokens)
    most = room if max_decode_batch is None else min(room, max_decode_batch)
    while node.decodes and len(batch) < most:
        batch.append(node.decodes.popleft())
    room -= len(batch)
    while node.prefills and room > 0:
        item = node.prefills[0]
        left = item.num_tokens - item.taken
        size = min(left, room)
        is_end = size == left
        batch.append(_Item(item.request, item.hop, item.past + item.taken, size, False, item.sample and is_end))
        item.taken += size
        room -= size
        if is_end:
            node.prefills.popleft()
    return batch


def _shape(batch: list[_Item], *, after_idle: float) -> BatchShape:
    prefills = [item for item in batch if not item.is_decode]
    decodes = len(batch) - len(prefills)
    return BatchShape(
        prefill_tokens=sum(item.num_tokens for item in prefills),
        prefill_chunks=len(prefills),
        prefill_pairs=sum(item.num_tokens * (item.past + (item.num_tokens + 1) / 2) for item in prefills),
        decode_tokens=decodes,
        decode_context_tokens=sum(item.past + 1 for item in batch if item.is_decode),
        sampled_tokens=sum(1 for item in batch if item.sample),
        after_idle=after_idle,
    )


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
