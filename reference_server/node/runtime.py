"""NodeRuntime: a stage's runner with its batcher and its requests. Work comes in, iterations run, messages go out."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from helixbench.errors import MeasurementError
from helixbench.profiler.stage.batch import StageItem
from helixbench.reference_server.node.kept import KeptStates, cut_rows
from helixbench.reference_server.node.runner import TOKEN_DTYPE, Payload, RunnerOutput, StageRunner
from helixbench.reference_server.wire.messages import CannotReplay, RequestsFailed, Sampled, Work
from helixbench.solver.scheduling.batcher import Batcher, Chunk
from helixbench.solver.scheduling.gather import Gather
from helixbench.solver.scheduling.recover import REPLAY_MEMORY_BYTES
from helixbench.solver.scheduling.work import OpenRequest, WorkItem, number_of

MAX_EARLY_BYTES = 1 << 28
"""Of work that is kept for requests that are not open yet; what overtakes an ``OpenRequest`` does so by moments."""

MAX_OVER = 10_000
"""Attempts that are remembered as over, so that what comes late of them is not taken for early."""

NOT_FINITE = "the model's logits are not finite: its weights hold such values, or its dtype is too small for it"


class Outbound(msgspec.Struct, frozen=True):
    """A message for a peer, or for the coordinator where ``peer`` is ``None``; ``tokens`` counts the tokens in it."""

    peer: str | None
    message: Work | Sampled | CannotReplay | RequestsFailed
    payload: memoryview | None
    tokens: int


class _Route(msgspec.Struct, frozen=True):
    entry_layer: int
    next_peer: str | None
    is_alone: bool  # the whole pipeline is this node
    kv_tokens: int
    deliver_from: int  # positions before this are not sent on


class _Early(msgspec.Struct, frozen=True):
    """Work that came before its request was opened."""

    item: WorkItem
    inputs: Any
    are_ids: bool
    size_bytes: int


class NodeRuntime:
    """Decides what a node does with work, without sockets and whatever its stage computes with.

    Args:
        node: its name in pipelines.
        runner: of the layers that it holds.
        max_batch_tokens: of one iteration.
        max_decode_batch: decoding sequences among them; ``None`` for no limit of their own.
        replay_memory_bytes: of the states that are kept of what was sent on.

    Attributes:
        shape: of the last batch: each item, with the layer at which it entered.
        announce: called when the shape of an iteration is known, before it runs.
        num_dropped: items and closes of attempts that were over, or that were never opened.
    """

    def __init__(
        self,
        node: str,
        runner: StageRunner[Any],
        *,
        max_batch_tokens: int,
        max_decode_batch: int | None = None,
        replay_memory_bytes: int = REPLAY_MEMORY_BYTES,
    ) -> None:
        self._node = node
        self.runner = runner
        self._batcher: Batcher[Chunk] = Batcher(max_batch_tokens=max_batch_tokens, max_decode_batch=max_decode_batch)
        self._gather: Gather[int] = Gather()
        self._clock = time.perf_counter
        self._begin_s = 0.0  # of the last iteration
        self._ending: set[int] = set()  # requests that it sampled for, whose token comes straight back
        self._routes: dict[int, _Route] = {}  # open request -> how its tokens pass this node
        self.shape: list[tuple[int, WorkItem]] = []
        self.announce: Callable[[], None] = lambda: None
        self._kept = KeptStates(replay_memory_bytes)
        self._early: OrderedDict[int, list[_Early]] = OrderedDict()  # attempt that is not open yet -> its work
        self._early_bytes = 0
        self._stuck: set[int] = set()  # open attempts whose states could not be replayed: nothing may overtake them
        self._over: OrderedDict[int, None] = OrderedDict()  # attempts that were closed, oldest first
        self.num_dropped = 0

    @property
    def has_work(self) -> bool:
        """Whether an iteration would run anything."""
        return self._batcher.has_work

    def wait_s(self) -> float:
        """Seconds to wait for more work before the next iteration; see ``Gather``."""
        return self._gather.wait_s(self._clock())

    def accept(self, work: Work, payload: Payload | None) -> list[Outbound]:
        """Take in a message: free, reserve, queue. Returns what it leads to at once: replays, and what failed.

        Work from another node can overtake the coordinator's ``OpenRequest``, which travels on a connection of its own:
        it waits for that. What is late, of an attempt that is over, is dropped and counted.
        """
        going: list[Outbound] = []
        for attempt in work.closes:
            self.close(attempt)
        for opened in work.opens:
            try:
                going += self._open(opened)
            except (MeasurementError, ValueError) as error:
                going.append(_failed([opened.request], error))
        if work.items:
            try:
                parts = self._parts(work, payload)
            except MeasurementError as error:
                return [*going, _failed([item.request for item in work.items], error)]
            for part in parts:
                try:
                    going += self._queue(part)
                except MeasurementError as error:
                    going.append(_failed([part.item.request], error))
        return going

    def close(self, attempt: int) -> None:
        """The attempt is over: free its slots, and drop what is queued, kept or early of it."""
        self._gather.returned((attempt,))
        is_open = self._routes.pop(attempt, None) is not None
        if is_open:
            self.runner.close(attempt)
            self._end(attempt)
        else:
            self.num_dropped += 1
        self._kept.drop(attempt)
        self._remember_over(attempt)

    def close_all(self) -> None:
        """Forget every request that is open; early work stays: it may be of requests that are about to be opened."""
        for attempt in list(self._routes):
            self.close(attempt)

    @property
    def attempts(self) -> Sequence[int]:
        """Those that are open."""
        return tuple(self._routes)

    def run_batch(self, run_tokens: dict[bool, int]) -> list[Outbound]:
        """Run one iteration and return what goes where; adds its tokens to ``run_tokens`` (is decode -> tokens).

        ``ended`` is to be called before any of it is sent.

        Raises:
            MeasurementError: the device has no memory for it. The requests of ``shape`` are to be failed.
        """
        self._begin_s = self._clock()
        decodes, prompts = self._batcher.next_batch()
        chunks = decodes + prompts
        items = [self._stage_item(chunk) for chunk in chunks]
        self.shape = [(item.entry_layer, chunk.item) for item, chunk in zip(items, chunks, strict=True)]
        self.announce()
        output = self.runner.forward(items)
        for chunk in chunks:
            run_tokens[chunk.item.is_decode] += chunk.item.num_tokens
        if self.runner.is_last:
            return self._sample(output)
        is_decode = {(chunk.item.request, chunk.item.past): chunk.item.is_decode for chunk in chunks}
        return self._forward_on(output, is_decode)

    def ended(self) -> None:
        """The iteration is over, the time that it was held back included: what it sampled may come back from now on."""
        if self.runner.is_last:
            now_s = self._clock()
            self._gather.sampled(self._ending, now_s=now_s, iteration_s=now_s - self._begin_s)

    def _parts(self, work: Work, payload: Payload | None) -> list[_Early]:
        """The message's items, each with its own rows of the inputs."""
        for item in work.items:
            if item.past < 0 or item.num_tokens < 1 or (item.is_decode and item.num_tokens != 1):
                raise MeasurementError(f"request {item.request} sends no possible tokens: {item}")
        num_tokens = sum(item.num_tokens for item in work.items)
        inputs = self.runner.read(payload, num_tokens=num_tokens, dtype=work.dtype)
        row_bytes = len(payload or b"") // num_tokens
        parts, start = [], 0
        for item in work.items:
            rows = inputs[start : start + item.num_tokens]
            parts.append(_Early(item, rows, work.dtype == TOKEN_DTYPE, row_bytes * item.num_tokens))
            start += item.num_tokens
        return parts

    def _open(self, opened: OpenRequest) -> list[Outbound]:
        attempt = opened.request
        places = [index for index, hop in enumerate(opened.hops) if hop.node == self._node]
        if len(places) != 1:
            raise MeasurementError(f"request {attempt} passes here {len(places)} times")
        hop = opened.hops[places[0]]
        if hop.end != self.runner.end or not self.runner.start <= hop.start < hop.end:
            held = f"[{self.runner.start},{self.runner.end})"
            raise MeasurementError(f"this node holds {held} and cannot run [{hop.start},{hop.end})")
        following = opened.hops[places[0] + 1 : places[0] + 2]
        next_peer = following[0].node if following else None
        if next_peer is None and not self.runner.is_last:
            raise MeasurementError(f"request {attempt}: its pipeline ends at layer {hop.end}, before the model does")
        if opened.adopts is None:
            self.runner.open(opened)
            if next_peer is not None:
                self._kept.open(attempt)
        else:
            self._adopt(opened)
        self._routes[attempt] = _Route(
            hop.start, next_peer, len(opened.hops) == 1, opened.kv_tokens, opened.deliver_from
        )
        going = self._replay(opened, next_peer) if opened.replays and next_peer is not None else []
        self._drop_early_before(attempt)
        for early in self._early.pop(attempt, []):
            self._early_bytes -= early.size_bytes
            going += self._queue(early)
        return going

    def _adopt(self, opened: OpenRequest) -> None:
        """The new attempt takes over cache and kept states; what is queued of the old one is dropped."""
        assert opened.adopts is not None
        if self._routes.pop(opened.adopts, None) is None:
            raise MeasurementError(f"attempt {opened.request} adopts {opened.adopts}, which is not open here")
        self.runner.adopt(opened)
        self._kept.rename(opened.adopts, opened.request)
        self._gather.returned((opened.adopts,))
        self._end(opened.adopts)
        self._remember_over(opened.adopts)

    def _replay(self, opened: OpenRequest, peer: str) -> list[Outbound]:
        states = self._kept.first(opened.request, opened.replays)
        if states is None:
            self._stuck.add(opened.request)
            return [Outbound(None, CannotReplay(opened.request), None, 0)]
        item = WorkItem(opened.request, 0, opened.replays, sample=False, is_decode=False)
        work = Work(items=(item,), dtype=self.runner.hidden_dtype)
        return [Outbound(peer, work, memoryview(states), opened.replays)]

    def _end(self, attempt: int) -> None:
        """Drop what is queued of the attempt."""
        self._stuck.discard(attempt)
        if self._batcher.has_work:
            self._batcher.retain(lambda chunk: chunk.item.request != attempt, lambda item, _: item.request != attempt)

    def _remember_over(self, attempt: int) -> None:
        self._over[attempt] = None
        if len(self._over) > MAX_OVER:
            self._over.popitem(last=False)
        for early in self._early.pop(attempt, []):
            self._early_bytes -= early.size_bytes
            self.num_dropped += 1

    def _drop_early_before(self, attempt: int) -> None:
        """Of one request, work of attempts before this one will never be wanted."""
        number = number_of(attempt)
        for earlier in [other for other in self._early if other < attempt and number_of(other) == number]:
            self._remember_over(earlier)

    def _queue(self, work: _Early) -> list[Outbound]:
        """Queue tokens of an open request; keep those that are early, and drop those that are late."""
        item = work.item
        route = self._routes.get(item.request)
        if route is None:
            if item.request in self._over:
                self.num_dropped += 1
                return []
            return self._keep_early(work)
        if item.request in self._stuck:
            self.num_dropped += 1
            return []
        if item.past + item.num_tokens > route.kv_tokens:
            raise MeasurementError(
                f"request {item.request} sends tokens {item.past}+{item.num_tokens}, "
                f"beyond its {route.kv_tokens} KV slots"
            )
        if work.are_ids != (route.entry_layer == 0):
            got = "token ids" if work.are_ids else "hidden states"
            raise MeasurementError(f"request {item.request} enters at layer {route.entry_layer}, but sends {got}")
        self._gather.returned((item.request,))
        if item.is_decode:
            self._batcher.add_decodes(Chunk(item, work.inputs, 0))
        else:
            self._batcher.add_prompt(item, work.inputs)
        return []

    def _keep_early(self, work: _Early) -> list[Outbound]:
        """Keep work until its request is opened; beyond the bound, the request that has waited longest fails."""
        self._early.setdefault(work.item.request, []).append(work)
        self._early_bytes += work.size_bytes
        failed = []
        while self._early_bytes > MAX_EARLY_BYTES:
            oldest = next(iter(self._early))
            self._remember_over(oldest)
            failed.append(_failed([oldest], "its work came, and nobody opened it"))
        return failed

    def _stage_item(self, chunk: Chunk) -> StageItem:
        item = chunk.item
        return StageItem(
            request=item.request,
            past=item.past,
            num_tokens=item.num_tokens,
            entry_layer=self._routes[item.request].entry_layer,
            sample=item.sample,
            inputs=chunk.inputs[chunk.offset : chunk.offset + item.num_tokens],
        )

    def _sample(self, output: RunnerOutput) -> list[Outbound]:
        sampled, failed = self.runner.sample(output)
        self._ending = {request for request, _ in sampled.tokens if self._routes[request].is_alone}
        going = [Outbound(None, sampled, None, len(sampled.tokens))] if sampled.tokens else []
        return [*going, _failed(failed, NOT_FINITE)] if failed else going

    def _forward_on(self, output: RunnerOutput, is_decode: Mapping[tuple[int, int], bool]) -> list[Outbound]:
        """Hidden states to the next node of each request, one message per node."""
        by_peer: dict[str | None, list[tuple[StageItem, slice]]] = {}
        end = 0
        for item in output.items:
            start, end = end, end + item.num_tokens
            by_peer.setdefault(self._routes[item.request].next_peer, []).append((item, slice(start, end)))
        outbound = []
        for peer, going in by_peer.items():
            assert peer is not None, "checked when it was opened"
            rows = [slice(0, end)] if len(by_peer) == 1 else [part for _, part in going]
            payload = self.runner.write(output, rows)
            self._keep([item for item, _ in going], payload)
            sent = [self._left_to_send(item, is_decode[item.request, item.past]) for item, _ in going]
            wire_items = tuple(item for item in sent if item is not None)
            if not wire_items:
                continue
            num_tokens = sum(item.num_tokens for item in wire_items)
            sizes = [item.num_tokens for item, _ in going]
            if num_tokens < sum(sizes):
                left = [0 if item is None else item.num_tokens for item in sent]
                skipped = [size - kept for size, kept in zip(sizes, left, strict=True)]
                payload = cut_rows(payload, sizes, skipped)
            message = Work(items=wire_items, dtype=self.runner.hidden_dtype)
            outbound.append(Outbound(peer, message, payload, num_tokens))
        return outbound

    def _keep(self, items: Sequence[StageItem], payload: memoryview) -> None:
        row_bytes = len(payload) // sum(item.num_tokens for item in items)
        begin = 0
        for item in items:
            end = begin + item.num_tokens * row_bytes
            self._kept.add(item.request, item.past, payload[begin:end], num_tokens=item.num_tokens)
            begin = end

    def _left_to_send(self, item: StageItem, is_decode: bool) -> WorkItem | None:
        """The item as it is sent on, without the positions whose KV entries the nodes behind have."""
        past = max(item.past, self._routes[item.request].deliver_from)
        num_tokens = item.past + item.num_tokens - past
        if num_tokens <= 0:
            return None
        return WorkItem(item.request, past, num_tokens, item.sample, is_decode)


def _failed(attempts: Sequence[int], cause: Exception | str) -> Outbound:
    return Outbound(None, RequestsFailed(tuple(attempts), str(cause)), None, 0)
