"""An agent measures itself: its own loop, fed over its own sockets by itself.

A message with hidden states goes round: out of the agent's socket, into its listening socket, through the loop, and out
again. So an iteration is timed with everything that serving does around it: receiving, decoding, batching, encoding,
encryption and sending.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch

from profiler.cluster_profile import CostSample
from profiler.cold_cache import CacheFlood
from profiler.compute import GridPoint, Iterate, grid, layer_counts_to_measure, peak_points
from profiler.cost import GATHER_UP_TO_TOKENS
from profiler.cuda_timer import CudaTimer
from profiler.disturbance import find_disturbance
from profiler.errors import InputError, MeasurementError
from profiler.fit import fit_cost
from profiler.memory import LoadedMemory, out_of_memory_is, workspace_bytes
from profiler.model_files import ModelFiles
from profiler.processor_speed import ProcessorSpeed
from profiler.quality import MemoryUse, Quality
from profiler.refine import points_to_add
from profiler.sampling import Block, Sampler
from profiler.stack import time_stack
from profiler.stage import Stage

from .dtypes import torch_dtype
from .messages import Hop, Load, OpenRequest, Profile, Profiled, Progress, Work, WorkItem
from .runtime import tensor_bytes
from .sampling import SamplingParams

if TYPE_CHECKING:
    from .agent import Agent
    from .pacing import Pacer

_SELF, _RING = "self", "ring"
_MIN_KV_TOKENS = 1024  # room for KV that a profiled stage must leave beside its weights
_CUDA_ROOM = 0.9  # part of a GPU's memory that may be held while it is measured: iterations need some too
_TURN_TIMEOUT_MS = 60_000


def profile(
    agent: Agent,
    command: Profile,
    *,
    taken: Sequence[Block] = (),
    on_block: Callable[[int, int], None] | None = None,
    on_round: Callable[[tuple[Block, ...]], None] = lambda _blocks: None,
) -> Profiled:
    """Measure stages of the model on this agent's node.

    Args:
        agent: whose loop is timed.
        command: what to measure.
        taken: blocks of an earlier, interrupted run of the same command.
        on_block: told (blocks done, expected) instead of the controller.
        on_round: given all blocks so far, after each round.

    Raises:
        InputError: the model has fewer than three layers, or not even one fits the memory.
    """
    began = time.monotonic()
    with prepared(agent, command) as ready:
        use = msgspec.structs.replace(ready.memory, workspace_bytes=ready.ring.workspace_bytes(ready.peaks))
        sampler = Sampler(
            ready.points,
            ready.ring.run,
            seed=0,
            taken=taken,
            timer=ready.ring.timer,
            disturbance=find_disturbance(agent.torch_device),
            before_iteration=_flood(agent.pacer, layer_bytes=agent.runtime.stage.weight_bytes / ready.num_layers),
            on_block=on_block or _reporter(agent),
            on_round=on_round,
        )
        deadline = time.monotonic() + command.budget_s
        _warm_up(sampler, ready, agent.pacer, pace=command.processor_speed)
        with out_of_memory_is(MeasurementError, "the whole stack of layers, timed"):
            stack = time_stack(agent.runtime.stage)
        refine = _refinement(sampler, command, device_type=agent.torch_device.type)
        sampled = sampler.measure(budget_s=deadline - time.monotonic(), refine=refine)
    workspace = use.workspace_bytes + use.overhead_bytes
    memory = agent.device.memory_bytes - workspace
    return Profiled(
        samples=sampled.samples,
        workspace_bytes=workspace,
        quality=Quality(
            drift=sampled.drift,
            discarded=sampled.discarded,
            num_refined=sampled.num_refined,
            seconds=time.monotonic() - began,
            stack=stack,
            memory=use,
            processor_speed=None if agent.pacer is None else agent.pacer.mean_speed(),
        ),
        processor_speed=None if agent.pacer is None else agent.pacer.nominal,
        max_layers=max(0, min(ready.files.num_layers, int(memory // ready.layer_bytes))),
        source=f"agent's own loop over its own transport, {ready.num_layers} layers held, {agent.torch_device}",
    )


def _warm_up(sampler: Sampler, ready: Prepared, pacer: Pacer | None, *, pace: ProcessorSpeed | None) -> None:
    """Let the node come to that pace, or find its own; what the speed is from then on counts as that of the profile."""
    first = next(p for p in ready.points if p.part == "layers")
    sampler.warm_up(first)
    if pacer is not None:
        if pace is not None:
            pacer.nominal = pace
        else:
            with ready.ring.run(first) as iterate:
                pacer.measure_nominal(iterate)
        pacer.mean_speed()


def _refinement(
    sampler: Sampler, command: Profile, *, device_type: str
) -> Callable[[Sequence[CostSample]], Sequence[GridPoint]]:
    """Which points to add to the sampler's, given what it measured."""

    def refine(samples: Sequence[CostSample]) -> Sequence[GridPoint]:
        cost = fit_cost(
            samples,
            workspace_bytes=0,
            max_batch_tokens=command.max_batch_tokens,
            source="so far",
            gather_up_to_tokens=GATHER_UP_TO_TOKENS[device_type],
            has_tiles=device_type == "cuda",
        )
        already = sum(sample.is_refined for sample in samples)
        return points_to_add(sampler.points, samples, cost, already_added=already)

    return refine


class Prepared(NamedTuple):
    """A stage that is loaded to be measured.

    ``peaks`` are batches that need most memory, ``layer_bytes`` is a layer with the least room for KV cache.
    """

    files: ModelFiles
    points: tuple[GridPoint, ...]
    peaks: tuple[GridPoint, ...]
    num_layers: int
    layer_bytes: float
    memory: MemoryUse
    ring: _Ring


@contextmanager
def prepared(agent: Agent, command: Profile) -> Iterator[Prepared]:
    """Load as many layers as the node holds, to be sent batches by itself; they are dropped on leaving.

    Raises:
        InputError: see ``profile``.
    """
    files = agent.open_model(command.model, command.model_digest)
    facts = files.facts(dtype=torch_dtype(command.dtype))
    layer_bytes = facts.layer_weight_bytes + _MIN_KV_TOKENS * facts.kv_bytes_per_token_per_layer
    if files.num_layers < 3:
        raise InputError(f"model {facts.name} has {files.num_layers} layers; profiling needs at least 3")
    is_cuda = agent.torch_device.type == "cuda"
    memory = agent.device.memory_bytes
    room = _CUDA_ROOM * (memory - _ends_bytes(files, torch_dtype(command.dtype))) if is_cuda else memory
    held = min(files.num_layers - 2, int(room // layer_bytes))
    if held < 1:
        raise InputError(
            f"one layer with room for {_MIN_KV_TOKENS} KV tokens takes {layer_bytes / 1e6:.0f} MB; "
            f"the node has {max(0.0, room) / 1e6:.0f} MB for it: give it more memory"
        )
    kv_tokens = int((room - held * facts.layer_weight_bytes) // (held * facts.kv_bytes_per_token_per_layer))
    points = grid(
        layer_counts=layer_counts_to_measure(held),
        max_batch_tokens=command.max_batch_tokens,
        max_context_tokens=command.max_context_tokens,
        max_kv_tokens=kv_tokens,
        has_tiles=is_cuda,
    )
    peaks = peak_points(
        num_layers=held,
        max_batch_tokens=command.max_batch_tokens,
        max_context_tokens=command.max_context_tokens,
        max_kv_tokens=kv_tokens,
        gather_up_to_tokens=GATHER_UP_TO_TOKENS[agent.torch_device.type],
    )
    loaded = LoadedMemory(agent.torch_device, memory_bytes=memory)
    agent.load(
        Load(
            model=command.model,
            model_digest=command.model_digest,
            dtype=command.dtype,
            node=_SELF,
            start=1,
            end=1 + held,
            kv_capacity_tokens=min(kv_tokens, max(point.kv_tokens for point in (*points, *peaks))),
            max_batch_tokens=command.max_batch_tokens,
            max_decode_batch=None,
            peers={_RING: _own_address(agent.address)},
        )
    )
    try:
        use = loaded.use_of(agent.runtime.stage)
        yield Prepared(files, points, peaks, held, layer_bytes, use, _Ring(agent, files, end=1 + held))
    finally:
        agent.unload()


def _ends_bytes(files: ModelFiles, dtype: torch.dtype) -> int:
    """Of the model's first and last layer with embedding and head, which ``_Ring`` loads beside the stage."""
    last = files.num_layers - 1
    return files.range_bytes(0, 1, dtype=dtype) + files.range_bytes(last, last + 1, dtype=dtype)


class _Ring:
    """Runs a batch again and again by sending it round; embedding and head run alone.

    Attributes:
        timer: of what the device does in an iteration, where it has a clock of its own.
    """

    def __init__(self, agent: Agent, files: ModelFiles, *, end: int) -> None:
        self._agent = agent
        self._end = end
        self._next_request = 0
        stage = agent.runtime.stage
        last = files.num_layers - 1
        with out_of_memory_is(InputError, "the model's first and last layer, to measure embedding and head"):
            self._first, self._last = (
                Stage(files, start=start, end=start + 1, kv_capacity_tokens=1, dtype=stage.dtype, device=stage.device)
                for start in (0, last)
            )
        self.timer = CudaTimer(stage.device) if stage.device.type == "cuda" else None
        agent.runtime.device_timer = self.timer or nullcontext()

    @contextmanager
    def run(self, point: GridPoint) -> Iterator[Iterate]:
        """The function that runs one iteration of the batch."""
        stage = self._agent.runtime.stage
        generator = torch.Generator().manual_seed(point.num_tokens)
        hidden = torch.randn((point.num_tokens, stage.hidden_size), generator=generator).to(stage.dtype)
        if point.part == "embedding":
            ids = torch.randint(stage.vocab_size, (point.num_tokens,), generator=generator)
            yield self._paced(lambda: self._embed(ids))
        elif point.part == "head":
            on_device = hidden.to(stage.device)
            yield self._paced(lambda: self._sample(on_device))
        else:
            requests = self._open(point)
            self._agent.send_to_peer(_RING, self._work(point, requests), tensor_bytes(hidden))
            yield self._turn
            # Not after an error: what failed has been taken in and comes back no more, and the stage is dropped.
            self._agent.discard_message(_TURN_TIMEOUT_MS)
            self._agent.runtime.accept(Work(closes=tuple(requests)), None)

    def workspace_bytes(self, points: Sequence[GridPoint]) -> float:
        """Peak memory of these batches beside weights and KV cache, messages included.

        They must be the first of all: later ones find memory that the process kept.
        """

        def run_each() -> None:
            for point in points:
                with self.run(point) as iterate:
                    iterate()

        return workspace_bytes(run_each, device=self._agent.torch_device)

    def _embed(self, ids: torch.Tensor) -> None:
        with out_of_memory_is(MeasurementError, "the embedding"), self._agent.runtime.device_timer:
            hidden = self._first.embed(ids)
        if hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)  # it stays there: the first layer follows

    def _sample(self, hidden: torch.Tensor) -> None:
        with out_of_memory_is(MeasurementError, "the head"), self._agent.runtime.device_timer:
            tokens = self._last.head(hidden).argmax(dim=-1)
        tokens.cpu()  # they are sent on, so they are copied

    def _paced(self, iterate: Iterate) -> Iterate:
        """As slow as the node is to be: an iteration of the agent's loop is that by itself."""
        pacer = self._agent.pacer
        if pacer is None:
            return iterate

        def paced() -> None:
            begin = time.perf_counter()
            iterate()
            pacer.hold(begin)
            pacer.wakeups.computing()

        pacer.forget()
        return paced

    def _turn(self) -> None:
        if not self._agent.turn(_TURN_TIMEOUT_MS):
            raise MeasurementError("the profiled batch did not come back over the node's own socket")

    def _open(self, point: GridPoint) -> list[int]:
        sizes = [past + new for past, new in point.prefills] + [past + 1 for past in point.decodes]
        requests = list(range(self._next_request, self._next_request + len(sizes)))
        self._next_request += len(sizes)
        hops = (Hop(_SELF, self._end - point.num_layers, self._end), Hop(_RING, self._end, self._end + 1))
        opens = tuple(
            OpenRequest(request, hops, size, SamplingParams()) for request, size in zip(requests, sizes, strict=True)
        )
        self._agent.runtime.accept(Work(opens=opens), None)
        return requests

    def _work(self, point: GridPoint, requests: list[int]) -> Work:
        parts = [(past, new, False) for past, new in point.prefills] + [(past, 1, True) for past in point.decodes]
        items = tuple(
            WorkItem(request, past, new, sample=True, is_decode=is_decode)
            for request, (past, new, is_decode) in zip(requests, parts, strict=True)
        )
        return Work(items=items, dtype=str(self._agent.runtime.stage.dtype).removeprefix("torch."))


def _flood(pacer: Pacer | None, *, layer_bytes: float) -> Callable[[GridPoint], None]:
    """Between iterations others use a shared machine's cache; a node with a machine of its own keeps it."""
    if pacer is None:
        return lambda _: None
    flood = CacheFlood()
    return lambda point: pacer.leave_out(lambda: flood(streamed_bytes=point.num_layers * layer_bytes))


def _own_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "*") else address


def _reporter(agent: Agent) -> Callable[[int, int], None]:
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            agent.tell_controller(Progress(done, total))

    return report
