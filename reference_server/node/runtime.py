"""NodeRuntime: a stage's runner with its batcher and its requests. Work comes in, iterations run, messages go out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import msgspec

from helixbench.errors import MeasurementError
from helixbench.profiler.stage.batch import StageItem
from helixbench.reference_server.node.runner import TOKEN_DTYPE, Payload, RunnerOutput, StageRunner
from helixbench.reference_server.wire.messages import Sampled, Work
from helixbench.solver.scheduling.batcher import Batcher, Chunk
from helixbench.solver.scheduling.gather import Gather
from helixbench.solver.scheduling.work import OpenRequest, WorkItem


class Outbound(msgspec.Struct, frozen=True):
    """A message for a peer, or for the coordinator where ``peer`` is ``None``; ``tokens`` counts the tokens in it."""

    peer: str | None
    message: Work | Sampled
    payload: memoryview | None
    tokens: int


class _Route(msgspec.Struct, frozen=True):
    entry_layer: int
    next_peer: str | None
    is_alone: bool  # the whole pipeline is this node
    kv_tokens: int


class _Early(msgspec.Struct, frozen=True):
    """Work that came before its request was opened."""

    item: WorkItem
    inputs: Any
    are_ids: bool


class NodeRuntime:
    """Decides what a node does with work, without sockets and whatever its stage computes with.

    Args:
        node: its name in pipelines.
        runner: of the layers that it holds.
        max_batch_tokens: of one iteration.
        max_decode_batch: decoding sequences among them; ``None`` for no limit of their own.

    Attributes:
        shape: of the last batch: each item, with the layer at which it entered.
        device_timer: entered around what the device does in an iteration.
    """

    def __init__(
        self, node: str, runner: StageRunner[Any], *, max_batch_tokens: int, max_decode_batch: int | None = None
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
        self.device_timer: AbstractContextManager[None] = nullcontext()
        self._early: dict[int, list[_Early]] = {}  # request that is not open yet -> its work

    @property
    def has_work(self) -> bool:
        """Whether an iteration would run anything."""
        return self._batcher.has_work

    def wait_s(self) -> float:
        """Seconds to wait for more work before the next iteration; see ``Gather``."""
        return self._gather.wait_s(self._clock())

    def accept(self, work: Work, payload: Payload | None) -> None:
        """Take in a message: free, reserve, queue.

        Work from another node can overtake the coordinator's ``OpenRequest``, which travels on a connection of its own:
        it waits for that.

        Raises:
            MeasurementError: the message does not fit the stage: sizes, ranges, or a request opened twice.
        """
        self._gather.returned(work.closes)
        for request in work.closes:
            if self._routes.pop(request, None) is None:
                raise MeasurementError(f"asked to close request {request}, which is not open")
            self.runner.close(request)
        for opened in work.opens:
            self._open(opened)
        if work.items:
            for item in work.items:
                if item.past < 0 or item.num_tokens < 1 or (item.is_decode and item.num_tokens != 1):
                    raise MeasurementError(f"request {item.request} sends no possible tokens: {item}")
            num_tokens = sum(item.num_tokens for item in work.items)
            inputs = self.runner.read(payload, num_tokens=num_tokens, dtype=work.dtype)
            start = 0
            for item in work.items:
                part = inputs[start : start + item.num_tokens]
                self._queue(_Early(item, part, are_ids=work.dtype == TOKEN_DTYPE))
                start += item.num_tokens

    def run_batch(self, run_tokens: dict[bool, int]) -> list[Outbound]:
        """Run one iteration and return what goes where; adds its tokens to ``run_tokens`` (is decode -> tokens).

        ``ended`` is to be called before any of it is sent.

        Raises:
            MeasurementError: what waits cannot be run: its request was closed, its pipeline ends too early, or the
                device has no memory for it.
        """
        self._begin_s = self._clock()
        decodes, prompts = self._batcher.next_batch()
        chunks = decodes + prompts
        items = [self._stage_item(chunk) for chunk in chunks]
        self.shape = [(item.entry_layer, chunk.item) for item, chunk in zip(items, chunks, strict=True)]
        with self.device_timer:
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

    def _open(self, opened: OpenRequest) -> None:
        places = [index for index, hop in enumerate(opened.hops) if hop.node == self._node]
        if len(places) != 1:
            raise MeasurementError(f"request {opened.request} passes here {len(places)} times")
        hop = opened.hops[places[0]]
        if hop.end != self.runner.end or not self.runner.start <= hop.start < hop.end:
            held = f"[{self.runner.start},{self.runner.end})"
            raise MeasurementError(f"this node holds {held} and cannot run [{hop.start},{hop.end})")
        following = opened.hops[places[0] + 1 : places[0] + 2]
        try:
            self.runner.open(opened)
        except ValueError as error:
            raise MeasurementError(f"{error}") from error
        next_peer = following[0].node if following else None
        self._routes[opened.request] = _Route(hop.start, next_peer, len(opened.hops) == 1, opened.kv_tokens)
        for early in self._early.pop(opened.request, []):
            self._queue(early)

    def _queue(self, work: _Early) -> None:
        item = work.item
        route = self._routes.get(item.request)
        if route is None:
            self._early.setdefault(item.request, []).append(work)
            return
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

    def _stage_item(self, chunk: Chunk) -> StageItem:
        item = chunk.item
        route = self._routes.get(item.request)
        if route is None:
            raise MeasurementError(f"request {item.request} was closed while its tokens waited")
        return StageItem(
            request=item.request,
            past=item.past,
            num_tokens=item.num_tokens,
            entry_layer=route.entry_layer,
            sample=item.sample,
            inputs=chunk.inputs[chunk.offset : chunk.offset + item.num_tokens],
        )

    def _sample(self, output: RunnerOutput) -> list[Outbound]:
        sampled = self.runner.sample(output)
        self._ending = {request for request, _ in sampled.tokens if self._routes[request].is_alone}
        return [Outbound(None, sampled, None, len(sampled.tokens))] if sampled.tokens else []

    def _forward_on(self, output: RunnerOutput, is_decode: Mapping[tuple[int, int], bool]) -> list[Outbound]:
        """Hidden states to the next node of each request, one message per node."""
        by_peer: dict[str | None, list[tuple[StageItem, slice]]] = {}
        end = 0
        for item in output.items:
            start, end = end, end + item.num_tokens
            by_peer.setdefault(self._routes[item.request].next_peer, []).append((item, slice(start, end)))
        outbound = []
        for peer, going in by_peer.items():
            if peer is None:
                raise MeasurementError("a pipeline ends before the model's last layer")
            rows = [slice(0, end)] if len(by_peer) == 1 else [part for _, part in going]
            wire_items = tuple(
                WorkItem(item.request, item.past, item.num_tokens, item.sample, is_decode[item.request, item.past])
                for item, _ in going
            )
            message = Work(items=wire_items, dtype=self.runner.hidden_dtype)
            num_tokens = sum(item.num_tokens for item, _ in going)
            outbound.append(Outbound(peer, message, self.runner.write(output, rows), num_tokens))
        return outbound
