"""A simulated node: the agent's batcher and gather rule, with modelled seconds where the agent computes.

What ``runtime.NodeRuntime`` does with messages is done here in the same order; only tensors are missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from profiler.cluster_profile import COORDINATOR
from solver.kernel import ITERATION_BEGIN, ITERATION_END, Kernel
from solver.stage_timing import Counts, StageTimer

from ..batcher import Batcher, Chunk
from ..gather import Gather
from ..history import HistoryKeeper
from ..messages import OpenRequest, WorkItem
from .checks import ConservationError

OnIteration: TypeAlias = Callable[[str, int, float], None]

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


class _Route:
    """How an open request's tokens pass this node, and how many of its KV slots they have filled."""

    __slots__ = ("entry", "filled", "is_alone", "kv_tokens", "next_node")

    def __init__(self, entry: int, next_node: str | None, is_alone: bool, kv_tokens: int) -> None:
        self.entry, self.next_node, self.is_alone, self.kv_tokens = entry, next_node, is_alone, kv_tokens
        self.filled = 0


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
        self._early: dict[int, list[WorkItem]] = {}  # not yet open -> work that came before
        self._is_last = is_last
        self._is_running = False
        self._is_woken = False  # something is scheduled at this very moment to begin an iteration
        self._running_since_s = self._ended_s = 0.0

    @property
    def open_requests(self) -> int:
        """Requests that hold KV slots here."""
        return len(self._routes)

    def receive(self, message: Message) -> None:
        """Take in a message: free, reserve, queue."""
        for request in message.closes:
            self._close(request)
        for opened in message.opens:
            self._open(opened)
        for item in message.items:
            self._queue(item)
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
        self._routes[request] = _Route(opened.hops[place].start, following, len(opened.hops) == 1, opened.kv_tokens)
        self.kv_used_tokens += opened.kv_tokens
        self.kv_peak_tokens = max(self.kv_peak_tokens, self.kv_used_tokens)
        if self.kv_used_tokens > self.kv_capacity_tokens:
            raise ConservationError(f"{self.name}: request {request} does not fit the KV cache")
        for item in self._early.pop(request, ()):
            self._queue(item)

    def _queue(self, item: WorkItem) -> None:
        route = self._routes.get(item.request)
        if route is None:
            self._early.setdefault(item.request, []).append(item)
            return
        self._gather.is_back(item.request)
        self._batcher.add(item, None)

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
        groups = self._by_entry(self._batcher.next_batch())
        counts = [(entry, _counts(chunks)) for entry, chunks in groups]
        seconds = self._timer.seconds(counts, idle_s=now_s - self._ended_s) * self.slowdown
        self._is_running = True
        self._running_since_s = now_s
        self._kernel.at(now_s + seconds, ITERATION_END, self._end, groups)

    def _by_entry(self, chunks: list[Chunk]) -> list[tuple[int, list[Chunk]]]:
        """The batch in the stage's order: by entry layer, else as it was."""
        routes = self._routes
        groups: dict[int, list[Chunk]] = {}
        for chunk in chunks:
            entry = routes[chunk.item.request].entry
            if entry in groups:
                groups[entry].append(chunk)
            else:
                groups[entry] = [chunk]
        return sorted(groups.items()) if len(groups) > 1 else list(groups.items())

    def _end(self, groups: list[tuple[int, list[Chunk]]]) -> None:
        now_s = self._kernel.now_s
        seconds = now_s - self._running_since_s
        self._is_running, self._ended_s = False, now_s
        going: dict[str | None, list[WorkItem]] = {}
        sizes: dict[str | None, int] = {}
        decodes = prefills = 0
        alone: set[int] = set()
        routes = self._routes
        for _, chunks in groups:
            for chunk in chunks:
                item = chunk.item
                route = routes[item.request]
                size = item.num_tokens
                if item.past != route.filled:
                    raise ConservationError(f"{self.name}: request {item.request} runs a token twice, or skips one")
                route.filled += size
                if item.is_decode:
                    decodes += 1
                else:
                    prefills += size
                to = route.next_node
                if to is None:
                    if not item.sample:
                        continue
                    size = 1
                    if route.is_alone:
                        alone.add(item.request)
                if to in going:
                    going[to].append(item)
                    sizes[to] += size
                else:
                    going[to] = [item]
                    sizes[to] = size
        self.busy_s += seconds
        self.iterations += 1
        self.decode_tokens += decodes
        self.prefill_tokens += prefills
        self.history.add(now_s - seconds, now_s, decode_tokens=decodes, kv_tokens=self.kv_used_tokens)
        if self._on_iteration is not None:
            self._on_iteration(self.name, decodes + prefills, seconds)
        if self._is_last:
            self._gather.sampled(alone, now_s=now_s, iteration_s=seconds)
        for to, items in going.items():
            if to is None:
                self._send(self.name, COORDINATOR, sizes[to], [item.request for item in items])
            else:
                self._send(self.name, to, sizes[to], Message(items))
        self._wake()


def _counts(chunks: Sequence[Chunk]) -> Counts:
    """What the timer has to know of the chunks."""
    prefill = prefills = decodes = context = sampled = 0
    pairs = 0.0
    for chunk in chunks:
        item = chunk.item
        if item.is_decode:
            decodes += 1
            context += item.past + 1
        else:
            size = item.num_tokens
            prefill += size
            prefills += 1
            pairs += size * (item.past + (size + 1) / 2)
            sampled += item.sample
    return prefill, prefills, pairs, decodes, context, sampled + decodes
