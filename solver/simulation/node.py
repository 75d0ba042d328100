"""A simulated node: the server's batcher and gather rule, with modelled seconds where a node computes.

Decoding sequences of one pipeline move in groups. All that an iteration's time depends on is a sum over its sequences,
so a group costs as much to simulate as a single one. Groups keep the order in which a server would run their members,
and only neighbours are merged: a limit on batches divides the same sequences as it does on a server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.problem.plan import Pipeline
from helixbench.solver.scheduling.batcher import Batcher, Chunk
from helixbench.solver.scheduling.gather import Gather
from helixbench.solver.scheduling.requests import DecodeGroup, InFlight
from helixbench.solver.scheduling.work import WorkItem
from helixbench.solver.simulation.event_loop import ITERATION_BEGIN, ITERATION_END, EventLoop
from helixbench.solver.simulation.stage_time import StageTimer, count_item

POLL_S = 1e-3
"""A node waits for messages in whole multiples of this, rounded up."""

Work: TypeAlias = DecodeGroup | Chunk
"""What an iteration runs: decoding sequences, or a chunk of a prompt, whose ``inputs`` is the ``InFlight``."""


class Message:
    """What a node takes in at once: work in the order in which it is queued, and requests that have ended."""

    __slots__ = ("ended", "num_tokens", "work")

    def __init__(self) -> None:
        self.work: list[Work] = []
        self.num_tokens = 0  # new ones, in all of the work
        self.ended: list[InFlight] = []

    def drop(self, states: Collection[InFlight]) -> None:
        """Remove all work of these requests."""
        self.work = without(self.work, states)
        self.num_tokens = sum(_tokens_of(work) for work in self.work)


def without(works: Iterable[Work], states: Collection[InFlight]) -> list[Work]:
    """The work without that of these requests; groups are changed in place."""
    left: list[Work] = []
    for work in works:
        if isinstance(work, DecodeGroup):
            work.drop(states)
            if work.members:
                left.append(work)
        elif work.inputs not in states:
            left.append(work)
    return left


def _tokens_of(work: Work) -> int:
    return work.count if isinstance(work, DecodeGroup) else work.item.num_tokens


Send: TypeAlias = Callable[[str, str, int, Any], None]
"""``(from, to, tokens, message)``: a ``Message`` to a node, to the coordinator a list of ``DecodeGroup``."""

OnIteration: TypeAlias = Callable[["SimulatedNode", int, int, float], None]
"""``(node, prefill tokens, decode tokens, seconds)`` of an iteration that ends."""


class _Route:
    """How the requests of a pipeline pass this node: entry layer, next node, and whether they pass no other node."""

    __slots__ = ("entry", "is_alone", "next_node")

    def __init__(self, name: str, pipeline: Pipeline) -> None:
        place = next(index for index, hop in enumerate(pipeline) if hop.node == name)
        self.entry = pipeline[place].start
        self.next_node = pipeline[place + 1].node if place + 1 < len(pipeline) else COORDINATOR
        self.is_alone = len(pipeline) == 1


class _Iteration:
    """What runs, and what is sent when it ends."""

    __slots__ = ("alone", "begin_s", "counts", "decode_tokens", "going", "prefill_tokens", "sampled", "whole_s")

    def __init__(self, begin_s: float) -> None:
        self.begin_s = begin_s
        self.whole_s = 0.0  # what it takes on a healthy node
        self.prefill_tokens = self.decode_tokens = 0
        self.counts: dict[int, list[float]] = {}  # entry layer -> ``Counts`` of what enters there
        self.going: dict[str, Message] = {}  # next node -> what goes there
        self.sampled: list[DecodeGroup] = []  # sequences that get a token
        self.alone: set[InFlight] = set()  # those of them that pass no other node

    def drop(self, states: Collection[InFlight]) -> None:
        """Send nothing of these requests when it ends."""
        for message in self.going.values():
            message.drop(states)
        self.going = {node: message for node, message in self.going.items() if message.work}
        for group in self.sampled:
            group.drop(states)
        self.sampled = [group for group in self.sampled if group.members]
        self.alone.difference_update(states)

    def count(self, entry: int, work: Work) -> int:
        """Add work that enters at a layer to the counts; returns its tokens."""
        counts = self.counts.get(entry)
        if counts is None:
            counts = self.counts[entry] = [0.0] * 6
        if isinstance(work, DecodeGroup):
            tokens = len(work.members)
            self.decode_tokens += tokens
            counts[3] += tokens
            counts[4] += work.context_tokens
            counts[5] += tokens
        else:
            tokens = work.item.num_tokens
            self.prefill_tokens += tokens
            count_item(counts, work.item)
        return tokens


class SimulatedNode:
    """One node.

    Args:
        name: its name.
        loop: clock and queue.
        pipelines: those that the router has chosen so far, by index.
        is_last: whether it holds the model's last layer, so that tokens are sampled here.
        timer: seconds of an iteration.
        batcher: as a server's.
        send: puts a message on the links.
        on_iteration: called when an iteration ends, before its results are sent.

    Attributes:
        slowdown: factor on every iteration's time.
        is_frozen: it ends no iteration and begins none.
        predicted_s: what its iterations would have taken without the slowdown.
        rebuilding: requests that run again, and the last node at which all of their tokens do: it sends only the newest
            one on.
        busy_s, iterations, prefill_tokens, decode_tokens: of the iterations that have ended.
    """

    def __init__(
        self,
        name: str,
        loop: EventLoop,
        pipelines: Sequence[Pipeline],
        *,
        is_last: bool,
        timer: StageTimer,
        batcher: Batcher[DecodeGroup],
        send: Send,
        on_iteration: OnIteration | None = None,
    ) -> None:
        self.name = name
        self.slowdown = 1.0
        self.is_frozen = False
        self.busy_s = self.predicted_s = 0.0
        self.rebuilding: Mapping[InFlight, str] = {}
        self._held: _Iteration | None = None  # of a frozen node: what would have ended
        self._running: _Iteration | None = None
        self.iterations = self.prefill_tokens = self.decode_tokens = 0
        self._loop, self._pipelines, self._timer, self._batcher, self._send = loop, pipelines, timer, batcher, send
        self._is_last, self._on_iteration = is_last, on_iteration
        self._gather: Gather[InFlight] = Gather()
        self._routes: dict[int, _Route] = {}  # pipeline -> how it passes, made when its first work comes
        self._has_late_entries = False  # pipelines enter at several layers
        self._is_running = False
        self._is_woken = False  # it is scheduled at this very moment to begin an iteration

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs here, and nothing waits to run."""
        return not (self._is_running or self._batcher.has_work)

    def resume(self) -> None:
        """A frozen node goes on with what it was doing."""
        self.is_frozen = False
        if self._held is not None:
            held, self._held = self._held, None
            self._end(held)
        self._wake()

    def forget(self, states: Collection[InFlight]) -> None:
        """Drop all work of these requests."""
        self._batcher.retain(lambda group: bool(without([group], states)), lambda _, inputs: inputs not in states)
        for iteration in (self._running, self._held):
            if iteration is not None:
                iteration.drop(states)
        self._gather.returned(states)

    def receive(self, message: Message) -> None:
        """Queue the work of a message."""
        is_waiting = self._gather.is_waiting
        if is_waiting:
            self._gather.returned(message.ended)
        for work in message.work:
            if (pipeline := _pipeline_of(work)) not in self._routes:
                self._open(pipeline)
            if isinstance(work, DecodeGroup):
                if is_waiting:
                    self._gather.returned(work.members)
                self._batcher.add_decodes(work)
            else:
                self._batcher.add_prompt(work.item, work.inputs)
        self._wake()

    def _open(self, pipeline: int) -> None:
        self._routes[pipeline] = _Route(self.name, self._pipelines[pipeline])
        self._has_late_entries = len({route.entry for route in self._routes.values()}) > 1

    def _wake(self) -> None:
        """Look at the end of this moment, when all messages of it are in, whether an iteration begins."""
        if not self._is_running and not self._is_woken and self._batcher.has_work:
            self._is_woken = True
            self._loop.at(self._loop.now_s, ITERATION_BEGIN, self._begin)

    def _begin(self, _: None) -> None:
        self._is_woken = False
        if self._is_running or self.is_frozen or not self._batcher.has_work:
            return
        now_s = self._loop.now_s
        wait_s = self._gather.wait_s(now_s)
        if wait_s > 0:
            self._loop.at(now_s + math.ceil(wait_s / POLL_S) * POLL_S, ITERATION_BEGIN, self._begin)
            return
        iteration = self._next_iteration()
        iteration.whole_s = self._timer.seconds(iteration.counts)
        seconds = iteration.whole_s * self.slowdown
        self._is_running, self._running = True, iteration
        self._loop.at(now_s + seconds, ITERATION_END, self._end, iteration)

    def _next_iteration(self) -> _Iteration:
        """The next batch, in the order in which a stage runs it and sends it on: by entry layer, else as it was.

        Neighbouring groups of one pipeline become one; from here on they move together.
        """
        decodes, chunks = self._batcher.next_batch()
        batch: list[Work] = [*decodes, *chunks]
        routes = self._routes
        if self._has_late_entries:
            batch.sort(key=lambda work: routes[_pipeline_of(work)].entry)
        iteration = _Iteration(self._loop.now_s)
        last: Work | None = None
        for work in batch:
            route = routes[_pipeline_of(work)]
            tokens = iteration.count(route.entry, work)
            if self._is_last:
                if isinstance(work, DecodeGroup) or work.item.sample:
                    group = work if isinstance(work, DecodeGroup) else DecodeGroup.of(work.inputs)
                    iteration.sampled.append(group)
                    if route.is_alone:
                        iteration.alone.update(group.members)
                continue
            if self.rebuilding and isinstance(work, Chunk) and self.rebuilding.get(work.inputs) == self.name:
                if not work.item.sample:
                    continue
                work, tokens = _newest_of(work), 1
            message = iteration.going.get(route.next_node)
            if message is None:
                message = iteration.going[route.next_node] = Message()
            message.num_tokens += tokens
            if isinstance(work, DecodeGroup) and isinstance(last, DecodeGroup) and last.pipeline == work.pipeline:
                last.members += work.members
                last.context_tokens += work.context_tokens
            else:
                message.work.append(work)
                last = work
        return iteration

    def _end(self, ran: _Iteration) -> None:
        if self.is_frozen:
            self._held = ran
            return
        now_s = self._loop.now_s
        seconds = now_s - ran.begin_s
        self._is_running, self._running = False, None
        self.predicted_s += ran.whole_s
        self.busy_s += seconds
        self.iterations += 1
        self.prefill_tokens += ran.prefill_tokens
        self.decode_tokens += ran.decode_tokens
        if self._on_iteration is not None:
            self._on_iteration(self, ran.prefill_tokens, ran.decode_tokens, seconds)
        if self._is_last:
            self._gather.sampled(ran.alone, now_s=now_s, iteration_s=seconds)
        if ran.sampled:
            self._send(self.name, COORDINATOR, sum([group.count for group in ran.sampled]), ran.sampled)
        for node, message in ran.going.items():
            self._send(self.name, node, message.num_tokens, message)
        self._wake()


def _newest_of(chunk: Chunk) -> Chunk:
    """Only the last of its tokens."""
    item = chunk.item
    last = WorkItem(item.request, item.past + item.num_tokens - 1, 1, sample=True, is_decode=False)
    return Chunk(last, chunk.inputs, 0)


def _pipeline_of(work: Work) -> int:
    """Index of the pipeline that it takes."""
    return work.pipeline if isinstance(work, DecodeGroup) else work.inputs.pipeline
