"""An agent measures itself: its own loop, fed over its own sockets by itself.

A message with hidden states goes round: out of the agent's socket, into its listening socket, through the loop, and out
again. So an iteration is timed with everything that serving does around it: receiving, decoding, batching, encoding,
encryption and sending.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch

from helixbench.errors import InputError
from helixbench.profiler.cluster import ModelFacts
from helixbench.profiler.cost.fit import fit_cost
from helixbench.profiler.cost.measured import CostSample, MemoryUse, Quality
from helixbench.profiler.cost.model import GATHER_UP_TO_TOKENS
from helixbench.profiler.measure.disturbance import find_disturbance
from helixbench.profiler.measure.grid import GridPoint, grid, layer_counts_to_measure, peak_points
from helixbench.profiler.measure.layer_times import batches
from helixbench.profiler.measure.memory import LoadedMemory
from helixbench.profiler.measure.refine import points_to_add
from helixbench.profiler.measure.sampler import Block, Sampler
from helixbench.profiler.model.files import ModelFiles
from helixbench.reference_server.node.torch_runner import torch_stage
from helixbench.reference_server.profiling.config import RING, SELF
from helixbench.reference_server.profiling.loopback import Ring
from helixbench.reference_server.wire.messages import Load, Profile, Profiled, Progress
from helixbench.reference_server.wire.transport import own_address

if TYPE_CHECKING:
    from helixbench.reference_server.node.agent import Agent

_MIN_KV_TOKENS = 1024  # room for KV that a profiled stage must leave beside its weights
_LAYER_TIMES_S, _LAYER_TIMES_SHARE = 30.0, 0.05  # at most, and of the time that was given, for single layers
_CUDA_ROOM = 0.9  # part of a GPU's memory that may be held while it is measured: iterations need some too


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
        sampler = Sampler(
            ready.points,
            ready.ring.run,
            seed=0,
            taken=taken,
            disturbance=find_disturbance(torch.device(agent.device_name)),
            on_block=on_block or _reporter(agent),
            on_round=on_round,
        )
        deadline = time.monotonic() + command.budget_s
        sampler.warm_up(next(point for point in ready.points if point.part == "layers"))
        sampled = sampler.measure(
            budget_s=deadline - time.monotonic(),
            refine=_refinement(sampler, command, device_type=agent.device.kind),
        )
        layers_until = time.monotonic() + min(_LAYER_TIMES_S, _LAYER_TIMES_SHARE * command.budget_s)
        layer_times = ready.ring.layer_times(
            ready.files,
            batches(
                max_batch_tokens=command.max_batch_tokens,
                max_context_tokens=command.max_context_tokens,
                max_kv_tokens=torch_stage(agent.runtime).kv.capacity_tokens,
            ),
            deadline=lambda: time.monotonic() > layers_until,
        )
    workspace = ready.memory.workspace_bytes + ready.memory.overhead_bytes
    memory = agent.device.memory_bytes - workspace
    return Profiled(
        samples=sampled.samples,
        workspace_bytes=workspace,
        quality=Quality(
            drift=sampled.drift,
            discarded=sampled.discarded,
            num_refined=sampled.num_refined,
            seconds=time.monotonic() - began,
            memory=ready.memory,
            layer_times=layer_times,
        ),
        max_layers=max(0, min(ready.files.num_layers, int(memory // ready.layer_bytes))),
        source=f"agent's own loop over its own transport, {ready.num_layers} layers held, {agent.device_name}",
    )


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

    ``layer_bytes`` is a layer with the least room for KV cache.
    """

    files: ModelFiles
    points: tuple[GridPoint, ...]
    num_layers: int
    layer_bytes: float
    memory: MemoryUse
    ring: Ring


class Fit(NamedTuple):
    """``num_layers`` that are held while a node is measured, ``kv_tokens`` slots beside them.

    ``layer_bytes`` is a layer with the least room for KV cache.
    """

    num_layers: int
    kv_tokens: int
    layer_bytes: float


def what_fits(facts: ModelFacts, *, memory_bytes: float, device_type: str) -> Fit:
    """As many layers as a node holds, but for the model's first and last.

    Those, with embedding and head, are loaded beside them (``Ring``). On a GPU they have to fit as well, and so has the
    workspace; a node on CPU has the machine's memory for them.

    Raises:
        InputError: the model has fewer than three layers, or not even one fits.
    """
    if facts.num_layers < 3:
        raise InputError(f"model {facts.name} has {facts.num_layers} layers; profiling needs at least 3")
    layer_bytes = facts.layer_weight_bytes + _MIN_KV_TOKENS * facts.kv_bytes_per_token_per_layer
    ends_bytes = 2 * facts.layer_weight_bytes + facts.embedding_bytes + facts.head_bytes
    room = _CUDA_ROOM * (memory_bytes - ends_bytes) if device_type == "cuda" else memory_bytes
    held = min(facts.num_layers - 2, int(room // layer_bytes))
    if held < 1:
        raise InputError(
            f"one layer with room for {_MIN_KV_TOKENS} KV tokens takes {layer_bytes / 1e6:.0f} MB; "
            f"the node has {max(0.0, room) / 1e6:.0f} MB for it: give it more memory"
        )
    kv_tokens = int((room - held * facts.layer_weight_bytes) // (held * facts.kv_bytes_per_token_per_layer))
    return Fit(held, kv_tokens, layer_bytes)


@contextmanager
def prepared(agent: Agent, command: Profile) -> Iterator[Prepared]:
    """Load as many layers as the node holds, to be sent batches by itself; they are dropped on leaving.

    Raises:
        InputError: see ``profile``.
    """
    files = agent.open_model(command.model, command.model_digest)
    if not isinstance(files, ModelFiles):
        raise InputError(
            f"model {command.model}: a hash model takes no time of its own to measure; profile it on emulated devices"
        )
    device_type, memory = agent.device.kind, agent.device.memory_bytes
    facts = files.facts(dtype=command.dtype)
    held, kv_tokens, layer_bytes = what_fits(facts, memory_bytes=memory, device_type=device_type)

    points = grid(
        layer_counts=layer_counts_to_measure(held),
        max_batch_tokens=command.max_batch_tokens,
        max_context_tokens=command.max_context_tokens,
        max_kv_tokens=kv_tokens,
        has_tiles=device_type == "cuda",
    )
    peaks = peak_points(
        num_layers=held,
        max_batch_tokens=command.max_batch_tokens,
        max_context_tokens=command.max_context_tokens,
        max_kv_tokens=kv_tokens,
        gather_up_to_tokens=GATHER_UP_TO_TOKENS[device_type],
    )
    kv_tokens = min(kv_tokens, max(point.kv_tokens for point in (*points, *peaks)))
    loaded = LoadedMemory(torch.device(agent.device_name), memory_bytes=memory)
    agent.load(
        Load(
            model=command.model,
            model_digest=command.model_digest,
            dtype=command.dtype,
            node=SELF,
            start=1,
            end=1 + held,
            kv_capacity_tokens=kv_tokens,
            max_batch_tokens=command.max_batch_tokens,
            max_decode_batch=None,
            peers={RING: own_address(agent.address)},
        )
    )
    try:
        use = loaded.use_of(torch_stage(agent.runtime))
        ring = Ring(agent, files, end=1 + held)
        use = msgspec.structs.replace(use, workspace_bytes=ring.workspace_bytes(peaks))
        yield Prepared(files, points, held, layer_bytes, use, ring)
    finally:
        agent.unload()


def _reporter(agent: Agent) -> Callable[[int, int], None]:
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            agent.tell_controller(Progress(done, total))

    return report
