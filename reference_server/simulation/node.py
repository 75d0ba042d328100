"""A simulated node: the agent's batcher and gather rule, with modelled seconds where the agent computes.

What ``runtime.NodeRuntime`` does with messages is done here in the same order; only tensors are missing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from helixbench.profiler.cluster import COORDINATOR
from helixbench.reference_server.simulation.checks import ConservationError
from helixbench.solver.scheduling.batcher import Batcher, Chunk
from helixbench.solver.scheduling.gather import Gather
from helixbench.solver.scheduling.history import HistoryKeeper
from helixbench.solver.scheduling.work import OpenRequest, WorkItem
from helixbench.solver.simulation.event_loop import ITERATION_BEGIN, ITERATION_END, Kernel
from helixbench.solver.simulation.stage_time import Counts, StageTimer

OnIteration: TypeAlias = Callable[[str, int, float], None]

_IntCounts: TypeAlias = tuple[int, int, float, int, int, int]  # Counts, of which all but the third are whole

_POLL_S = 1e-3  # the agent waits for messages in whole milliseconds, rounded up


class Message:
    """What a node takes in at once: requests that open and close, and tokens to run."""

    __slots__ = ("closes", "items", "opens")

    def __init__(
        self, items: Sequence[WorkItem], opens: Sequence[OpenRequest] = (), closes: Sequence[int] = ()
    ) -> None:
        self.items, self.opens, self.closes = items, opens, closes


Send: TypeAlias = Callable[[str, str, int, Any], None]
"""``(from, to, tokens, message)``: to a node a ``Message``, to the coordinator a tuple of request numbers."""


class _Way:
    """How requests of one kind pass this node: the layer at which they enter, and where they go from here."""

    __slots__ = ("entry", "is_alone", "next_node")

    def __init__(self, entry: int, next_node: str | None, is_alone: bool) -> None:
        self.entry, self.next_node, self.is_alone = entry, next_node, is_alone


class _Route:
    """An open request: its way, and how many of its KV slots it has filled, counting the iteration that runs."""

    __slots__ = ("filled", "kv_tokens", "way")

    def __init__(self, way: _Way, kv_tokens: int) -> None:
        self.way, self.kv_tokens = way, kv_tokens
        self.filled = 0


class _Iteration:
    """What an iteration runs: ``counts`` by entry layer for the timer, and where its items go on from here."""

    __slots__ = ("alone", "counts", "decodes", "going", "prefills")

    def __init__(self) -> None:
        self.counts: list[tuple[int, Counts]] = []
        self.going: dict[str | None, list[WorkItem]] = {}  # next node, None for the coordinator -> items
        self.alone: set[int] = set()  # requests whose sampled token comes straight back
        self.decodes = self.prefills = 0  # tokens


class SimulatedNode:
    """One node of the plan.

    Args:
        name: its name.
        is_last: whether it holds the model's last layer, so that tokens are sampled here.
        kernel: clock and queue.
        timer: seconds of an iteration.
        batcher: as the agent's.
        kv_capacity_tokens: KV slots.
        send: puts a message on the network.
        on_iteration: told ``(node, tokens, seconds)`` of every iteration that ends.
    """

    def __init__(
        self,
        name: str,
        kernel: Kernel,
        *,
        is_last: bool,
        timer: StageTimer,
        batcher: Batcher,
        kv_capacity_tokens: int,
        send: Send,
        on_iteration: OnIteration | None = None,
    ) -> None:
        self.name = name
        self.kv_capacity_tokens = kv_capacity_tokens
        self.kv_used_tokens = self.kv_peak_tokens = 0
        self.busy_s = 0.0
        self.iterations = self.prefill_tokens = self.decode_tokens = 0
        self.history = HistoryKeeper()
        self.slowdown = 1.0
        self._kernel, self._timer, self._batcher, self._send = kernel, timer, batcher, send
        self._on_iteration = on_iteration
        self._gather = Gather()
        self._routes: dict[int, _Route] = {}  # open request -> how it passes
        self._ways: dict[tuple[int, str | None, bool], _Way] = {}  # its three parts -> the way
        self._early: dict[int, list[WorkItem]] = {}  # not yet open -> work that came before
        self._is_last = is_last
        self._is_running = False
        self._is_woken = False  # something is scheduled at this very moment to begin an iteration
        self._running_since_s = 0.0

    @property
    def open_requests(self) -> int:
        """Requests that hold KV slots here."""
        return len(self._routes)

    @property
    def num_early(self) -> int:
        """Requests that are not open, and work for which has come."""
        return len(self._early)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs here, and nothing waits to run."""
        return not (self._is_running or self._batcher.has_work)

    def receive(self, message: Message) -> None:
        """Take in a message: free, reserve, queue."""
        for request in message.closes:
            self._close(request)
        for opened in message.opens:
            self._open(opened)
        routes, add = self._routes, self._batcher.add
        gather = self._gather if self._gather.is_waiting else None
        for item in message.items:
            request = item.request
            route = routes.get(request)
            if route is None:
                self._early.setdefault(request, []).append(item)
                continue
            if gather is not None:
                gather.is_back(request)
            add(item, route)
        if not self._is_running and not self._is_woken:
            self._wake()

    def _close(self, request: int) -> None:
        self._gather.is_back(request)
        route = self._routes.pop(request)
        if route.filled != route.kv_tokens:
            raise ConservationError(f"{self.name}: request {request} filled {route.filled} of {route.kv_tokens} slots")
        self.kv_used_tokens -= route.kv_tokens

    def _open(self, opened: OpenRequest) -> None:
        request = opened.request
        place = next(index for index, hop in enumerate(opened.hops) if hop.node == self.name)
        following = opened.hops[place + 1].node if place + 1 < len(opened.hops) else None
        if request in self._routes:
            raise ConservationError(f"{self.name}: request {request} was opened twice")
        parts = (opened.hops[place].start, following, len(opened.hops) == 1)
        way = self._ways.get(parts)
        if way is None:
            way = self._ways[parts] = _Way(*parts)
        route = self._routes[request] = _Route(way, opened.kv_tokens)
        self.kv_used_tokens += opened.kv_tokens
        self.kv_peak_tokens = max(self.kv_peak_tokens, self.kv_used_tokens)
        if self.kv_used_tokens > self.kv_capacity_tokens:
            raise ConservationError(f"{self.name}: request {request} does not fit the KV cache")
        for item in self._early.pop(request, ()):
            self._gather.is_back(request)
            self._batcher.add(item, route)

    def _wake(self) -> None:
        """Look at the end of this moment whether an iteration begins."""
        if not self._is_running and not self._is_woken and self._batcher.has_work:
            self._is_woken = True
            self._kernel.at(self._kernel.now_s, ITERATION_BEGIN, self._begin)

    def _begin(self, _: None) -> None:
        self._is_woken = False
        if self._is_running or not self._batcher.has_work:
            return
        now_s = self._kernel.now_s
        wait_s = self._gather.wait_s(now_s)
        if wait_s > 0:
            self._kernel.at(now_s + math.ceil(wait_s / _POLL_S) * _POLL_S, ITERATION_BEGIN, self._begin)
            return
        iteration = self._take(self._batcher.next_batch())
        seconds = self._timer.seconds(iteration.counts) * self.slowdown
        self._is_running = True
        self._running_since_s = now_s
        self._kernel.at(now_s + seconds, ITERATION_END, self._end, iteration)

    def _take(self, chunks: list[Chunk]) -> _Iteration:
        """The batch in the stage's order: by entry layer, else as it was. A chunk's ``inputs`` is its route."""
        by_way: dict[_Way, list[WorkItem]] = {}
        for chunk in chunks:
            item, route = chunk.item, chunk.inputs
            if item.past != route.filled:
                raise ConservationError(f"{self.name}: request {item.request} runs a token twice, or skips one")
            route.filled += item.num_tokens
            way = route.way
            if way in by_way:
                by_way[way].append(item)
            else:
                by_way[way] = [item]
        ways = sorted(by_way, key=lambda way: way.entry) if len(by_way) > 1 else list(by_way)
        iteration = _Iteration()
        going = iteration.going
        for entry, alike in itertools.groupby(ways, key=lambda way: way.entry):
            counts = (0, 0, 0.0, 0, 0, 0)
            for way in alike:
                items = by_way[way]
                counts = _counted(counts, items)
                if way.next_node is None:
                    items = [item for item in items if item.sample]
                    if way.is_alone:
                        iteration.alone.update([item.request for item in items])
                if items:
                    going[way.next_node] = going[way.next_node] + items if way.next_node in going else items
            iteration.counts.append((entry, counts))
            iteration.prefills += counts[0]
            iteration.decodes += counts[3]
        return iteration

    def _end(self, ran: _Iteration) -> None:
        now_s = self._kernel.now_s
        seconds = now_s - self._running_since_s
        self._is_running = False
        self.busy_s += seconds
        self.iterations += 1
        self.decode_tokens += ran.decodes
        self.prefill_tokens += ran.prefills
        self.history.add(now_s - seconds, now_s, decode_tokens=ran.decodes, kv_tokens=self.kv_used_tokens)
        if self._on_iteration is not None:
            self._on_iteration(self.name, ran.decodes + ran.prefills, seconds)
        if self._is_last:
            self._gather.sampled(ran.alone, now_s=now_s, iteration_s=seconds)
        for to, items in ran.going.items():
            if to is None:
                self._send(self.name, COORDINATOR, len(items), [item.request for item in items])
            else:
                self._send(self.name, to, sum([item.num_tokens for item in items]), Message(items))
        self._wake()


def _counted(before: _IntCounts, items: Sequence[WorkItem]) -> _IntCounts:
    """What the timer has to know of items that enter at one layer, added to what it knows of others there."""
    prefill, prefills, pairs, decodes, context, sampled = before
    for item in items:
        if item.is_decode:
            decodes += 1
            sampled += 1
            context += item.past + 1
        else:
            size = item.num_tokens
            prefill += size
            prefills += 1
            pairs += size * (item.past + (size + 1) / 2)
            sampled += item.sample
    return prefill, prefills, pairs, decodes, context, sampled
