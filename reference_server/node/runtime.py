"""NodeRuntime: a stage with its batcher and its requests. Work comes in, an iteration runs, messages come out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import msgspec
import numpy as np
import torch

from helixbench.errors import MeasurementError
from helixbench.profiler.measure.memory import out_of_memory_is
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.stage import Stage, StageOutput
from helixbench.reference_server.node.token_sampling import sample, score
from helixbench.reference_server.wire.messages import Sampled, Work
from helixbench.solver.scheduling.batcher import Batcher, Chunk
from helixbench.solver.scheduling.gather import Gather
from helixbench.solver.scheduling.work import OpenRequest, Scores, TokenScore, WorkItem

SCORED_ROWS = 16  # rows of logits at a time: the memory of more was not measured


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
    opened: OpenRequest


class NodeRuntime:
    """What a node does with work, free of sockets.

    Args:
        node: its name in pipelines.
        stage: the layers that it holds.
        max_batch_tokens: of one iteration.
        max_decode_batch: decoding sequences among them; ``None`` for no limit of their own.

    Attributes:
        device_timer: entered around what the device does in an iteration.
    """

    def __init__(self, node: str, stage: Stage, *, max_batch_tokens: int, max_decode_batch: int | None = None) -> None:
        self._node = node
        self.stage = stage
        self._batcher: Batcher[Chunk] = Batcher(max_batch_tokens=max_batch_tokens, max_decode_batch=max_decode_batch)
        self._gather: Gather[int] = Gather()
        self._clock = time.perf_counter
        self._begin_s = 0.0  # of the last iteration
        self._ending: set[int] = set()  # requests that it sampled for, whose token comes straight back
        self._routes: dict[int, _Route] = {}  # open request -> how its tokens pass this node
        self.device_timer: AbstractContextManager[None] = nullcontext()
        self._prompt_scores: dict[
            int, list[TokenScore]
        ] = {}  # open request that wants them -> those of its prompt so far
        self._early: dict[int, list[tuple[WorkItem, torch.Tensor]]] = {}  # not yet open -> work that came before

    @property
    def has_work(self) -> bool:
        """Whether an iteration would run anything."""
        return self._batcher.has_work

    def wait_s(self) -> float:
        """Seconds to wait for more work before the next iteration; see ``Gather``."""
        return self._gather.wait_s(self._clock())

    def accept(self, work: Work, payload: bytes | memoryview | None) -> None:
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
            self._prompt_scores.pop(request, None)
            self.stage.kv.release(request)
        for opened in work.opens:
            self._open(opened)
        if work.items:
            for item in work.items:
                if item.past < 0 or item.num_tokens < 1 or (item.is_decode and item.num_tokens != 1):
                    raise MeasurementError(f"request {item.request} sends no possible tokens: {item}")
            inputs = self._inputs(work, payload)
            start = 0
            for item in work.items:
                self._queue(item, inputs[start : start + item.num_tokens])
                start += item.num_tokens

    def run_batch(self, run_tokens: dict[bool, int]) -> list[Outbound]:
        """Run one iteration and say what goes where; adds its tokens to ``run_tokens`` (is decode -> tokens).

        ``ended`` is to be called before any of it is sent.

        Raises:
            MeasurementError: what waits cannot be run: its request was closed, its pipeline ends too early, or the
                device has no memory for it.
        """
        self._begin_s = self._clock()
        decodes, prompts = self._batcher.next_batch()
        chunks = decodes + prompts
        items = [self._stage_item(chunk) for chunk in chunks]
        what = f"an iteration of {sum(item.num_tokens for item in items)} tokens"
        with out_of_memory_is(MeasurementError, what), self.device_timer:
            output = self.stage.forward(items)
        for chunk in chunks:
            run_tokens[chunk.item.is_decode] += chunk.item.num_tokens
        is_decode = {(chunk.item.request, chunk.item.past): chunk.item.is_decode for chunk in chunks}
        if output.logits is not None:
            self._score_prompts(output)
            outbound = self._sample(output.items, output.logits)
            alone = (item.request for item in output.items if item.sample and self._routes[item.request].is_alone)
            self._ending = set(alone)
            return outbound
        return self._forward_on(output.items, output.hidden, is_decode)

    def ended(self) -> None:
        """The iteration is over, the time that it was held back included: what it sampled may come back from now on."""
        if self.stage.is_last:
            now_s = self._clock()
            self._gather.sampled(self._ending, now_s=now_s, iteration_s=now_s - self._begin_s)

    def _open(self, opened: OpenRequest) -> None:
        places = [index for index, hop in enumerate(opened.hops) if hop.node == self._node]
        if len(places) != 1:
            raise MeasurementError(f"request {opened.request} passes here {len(places)} times")
        hop = opened.hops[places[0]]
        if hop.end != self.stage.end or not self.stage.start <= hop.start < hop.end:
            held = f"[{self.stage.start},{self.stage.end})"
            raise MeasurementError(f"this node holds {held} and cannot run [{hop.start},{hop.end})")
        following = opened.hops[places[0] + 1 : places[0] + 2]
        try:
            with out_of_memory_is(MeasurementError, f"packing the KV cache for request {opened.request}"):
                self.stage.kv.reserve(opened.request, opened.kv_tokens)
        except ValueError as error:
            raise MeasurementError(f"{error}") from error
        next_peer = following[0].node if following else None
        self._routes[opened.request] = _Route(hop.start, next_peer, len(opened.hops) == 1, opened)
        if opened.scored and self.stage.is_last:
            self._prompt_scores[opened.request] = []
        for item, inputs in self._early.pop(opened.request, []):
            self._queue(item, inputs)

    def _queue(self, item: WorkItem, inputs: torch.Tensor) -> None:
        route = self._routes.get(item.request)
        if route is None:
            self._early.setdefault(item.request, []).append((item, inputs))
            return
        if item.past + item.num_tokens > route.opened.kv_tokens:
            raise MeasurementError(
                f"request {item.request} sends tokens {item.past}+{item.num_tokens}, "
                f"beyond its {route.opened.kv_tokens} KV slots"
            )
        if (inputs.dim() == 1) != (route.entry_layer == 0):
            got = "token ids" if inputs.dim() == 1 else "hidden states"
            raise MeasurementError(f"request {item.request} enters at layer {route.entry_layer}, but sends {got}")
        self._gather.returned((item.request,))
        if item.is_decode:
            self._batcher.add_decodes(Chunk(item, inputs, 0))
        else:
            self._batcher.add_prompt(item, inputs)

    def _inputs(self, work: Work, payload: bytes | memoryview | None) -> torch.Tensor:
        """Token ids [T] or hidden states [T, E] of a message, in memory of their own."""
        num_tokens = sum(item.num_tokens for item in work.items)
        is_ids = work.dtype == "int32"
        dtype = torch.int32 if is_ids else self.stage.dtype
        shape = (num_tokens,) if is_ids else (num_tokens, self.stage.hidden_size)
        size = dtype.itemsize * int(np.prod(shape))
        if f"torch.{work.dtype}" != str(dtype) or payload is None or len(payload) != size:
            got = "nothing" if payload is None else f"{len(payload)} bytes"
            raise MeasurementError(f"need {size} bytes of {dtype} for {num_tokens} tokens, got {got} of {work.dtype}")
        raw = torch.empty(size, dtype=torch.uint8)
        raw.numpy()[:] = np.frombuffer(payload, dtype=np.uint8)
        inputs = raw.view(dtype).view(shape)
        if is_ids and not 0 <= int(inputs.min()) <= int(inputs.max()) < self.stage.vocab_size:
            raise MeasurementError(f"a token id is not in [0,{self.stage.vocab_size})")
        return inputs

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

    def _sample(self, items: tuple[StageItem, ...], logits: torch.Tensor) -> list[Outbound]:
        sampling_items = [item for item in items if item.sample]
        if not sampling_items:
            return []
        greedy = logits.argmax(dim=-1).tolist()
        tokens, scores = [], []
        for row, item in enumerate(sampling_items):
            opened = self._routes[item.request].opened
            sampling, token, position = opened.sampling, greedy[row], item.past + item.num_tokens
            barred = opened.stop_token_ids if position < opened.stop_from else ()
            if barred or sampling.temperature > 0:
                seed = opened.request if sampling.seed is None else sampling.seed
                token = sample(logits[row], sampling, seed=seed, position=position, barred=barred)
            tokens.append((item.request, token))
            if sampling.num_logprobs is not None:
                (output,) = score(logits[row : row + 1], [token], sampling.num_logprobs)
                scores.append(Scores(item.request, output, tuple(self._prompt_scores.pop(item.request, ()))))
        return [Outbound(None, Sampled(tuple(tokens), tuple(scores)), None, len(tokens))]

    def _score_prompts(self, output: StageOutput) -> None:
        """Score the prompt tokens that follow those just run, where wanted; a few rows of logits at a time."""
        end = 0
        for item in output.items if self._prompt_scores else ():
            end += item.num_tokens
            if item.request not in self._prompt_scores:
                continue
            opened = self._routes[item.request].opened
            following = opened.scored[item.past + 1 : item.past + 1 + item.num_tokens]
            rows = output.hidden[end - item.num_tokens :]
            for start in range(0, len(following), SCORED_ROWS):
                tokens = following[start : start + SCORED_ROWS]
                logits = self.stage.head(rows[start : start + len(tokens)])
                self._prompt_scores[item.request] += score(logits, tokens, opened.sampling.num_logprobs or 0)

    def _forward_on(
        self, items: tuple[StageItem, ...], hidden: torch.Tensor, is_decode: Mapping[tuple[int, int], bool]
    ) -> list[Outbound]:
        by_peer: dict[str | None, list[tuple[StageItem, torch.Tensor]]] = {}
        start = 0
        for item in items:
            rows = hidden[start : start + item.num_tokens]
            by_peer.setdefault(self._routes[item.request].next_peer, []).append((item, rows))
            start += item.num_tokens
        outbound = []
        for peer, going in by_peer.items():
            if peer is None:
                raise MeasurementError("a pipeline ends before the model's last layer")
            tensor = hidden if len(by_peer) == 1 else torch.cat([rows for _, rows in going])
            wire_items = tuple(
                WorkItem(item.request, item.past, item.num_tokens, item.sample, is_decode[item.request, item.past])
                for item, _ in going
            )
            message = Work(items=wire_items, dtype=str(self.stage.dtype).removeprefix("torch."))
            outbound.append(Outbound(peer, message, tensor_bytes(tensor), tensor.shape[0]))
        return outbound


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's raw bytes, row-major, on the host."""
    raw: Any = tensor.contiguous().cpu().view(torch.uint8).numpy().reshape(-1)
    return memoryview(raw)
