"""Profile of an emulated node: its cost is the device's, and a few iterations show whether the node keeps to it."""

from __future__ import annotations

import array
import statistics
import time
from typing import TYPE_CHECKING

import msgspec

from helixbench.errors import InputError, MeasurementError
from helixbench.profiler.cost.measured import Quality
from helixbench.profiler.cost.model import BatchShape, StageCost
from helixbench.reference_server.profiling.config import RING, SELF
from helixbench.reference_server.testbed.emulation import EmulatedNode
from helixbench.reference_server.wire.messages import Load, Profile, Profiled, Work
from helixbench.reference_server.wire.transport import own_address
from helixbench.solver.problem.plan import Hop
from helixbench.solver.scheduling.work import OpenRequest, SamplingParams, WorkItem

if TYPE_CHECKING:
    from helixbench.reference_server.node.agent import Agent

MIN_KV_TOKENS = 1024
"""Room for KV cache that a node must have beside the layers that it is said to hold."""

CHECKED_SEQUENCES = (1, 8)
CHECKED_ITERATIONS = 5  # of each batch, after one that warms up
CHECKED_LAYERS = 4
_PROMPT_TOKENS = 8
_TURN_TIMEOUT_MS = 60_000


def profile_emulated(agent: Agent, device: EmulatedNode, command: Profile) -> Profiled:
    """The device's cost for the model, and how far checked iterations of the agent's loop are off it.

    Raises:
        InputError: the device has no times for the model, holds no layer of it, or the model has one layer.
        MeasurementError: the node does not keep to the device's times; says which time scale would do.
    """
    began = time.monotonic()
    model = agent.open_model(command.model, command.model_digest)
    facts = model.facts(dtype=command.dtype)
    times = device.stage_times(facts)
    layer_bytes = facts.layer_weight_bytes + MIN_KV_TOKENS * facts.kv_bytes_per_token_per_layer
    max_layers = min(facts.num_layers, int(agent.device.memory_bytes // layer_bytes))
    beside_embedding = int((agent.device.memory_bytes - facts.embedding_bytes) // layer_bytes)  # the first are checked
    num_layers = min(max_layers, facts.num_layers - 1, CHECKED_LAYERS, beside_embedding)
    if num_layers < 1:
        raise InputError(
            f"model {facts.name} has {facts.num_layers} layers of {layer_bytes / 1e6:.0f} MB with room for "
            f"{MIN_KV_TOKENS} KV tokens, and an embedding of {facts.embedding_bytes / 1e6:.0f} MB; an emulated "
            f"{agent.device.name} of {agent.device.memory_bytes / 1e6:.0f} MB holds no layer beside it: "
            "give it more memory, or take a model of two layers at least"
        )
    errors = _checked(agent, device, command, times.cost.stage, num_layers)
    checked = f"{len(errors)} batches checked, {max(errors):.1%} off at most"
    return Profiled(
        samples=(),
        workspace_bytes=0.0,
        max_layers=max_layers,
        source=times.cost.source,
        cost=msgspec.structs.replace(
            times.cost,
            samples=(),
            held_out_error_median=statistics.median(errors),
            held_out_error_p90=max(errors),
            workspace_bytes=0.0,
            max_batch_tokens=min(command.max_batch_tokens, times.cost.max_batch_tokens),
            source=f"emulated {agent.device.name}, {times.origin}: {times.cost.source}; {checked}",
            quality=Quality(seconds=time.monotonic() - began),
        ),
        origin=times.origin,
    )


def _checked(agent: Agent, device: EmulatedNode, command: Profile, cost: StageCost, num_layers: int) -> list[float]:
    """Relative error of the iterations of each batch, run by the agent's own loop on its own messages.

    Raises:
        MeasurementError: of some batch all iterations are late.
    """
    agent.load(
        Load(
            model=command.model,
            model_digest=command.model_digest,
            dtype=command.dtype,
            node=SELF,
            start=0,
            end=num_layers,
            kv_capacity_tokens=max(CHECKED_SEQUENCES) * (_PROMPT_TOKENS + CHECKED_ITERATIONS + 2),
            max_batch_tokens=command.max_batch_tokens,
            max_decode_batch=None,
            peers={RING: own_address(agent.address)},
        )
    )
    try:
        errors = []
        for sequences in CHECKED_SEQUENCES:
            late = device.late_iterations
            ratios = _iterations(agent, device, cost, sequences=sequences, num_layers=num_layers)
            # One that is in time shows that the node can: this machine did something else during the others.
            if device.late_iterations - late > CHECKED_ITERATIONS:
                raise MeasurementError(
                    f"iterations of {sequences} sequences are all late, the fastest {min(ratios):.3g} times what the "
                    f"device takes: this machine is too slow to emulate {agent.device.name} at a time scale of "
                    f"{device.time_scale:g}; set `time_scale` in the testbed file to a larger one"
                )
            errors.append(abs(statistics.median(ratios) - 1))
        return errors
    finally:
        agent.unload()


def _iterations(agent: Agent, device: EmulatedNode, cost: StageCost, *, sequences: int, num_layers: int) -> list[float]:
    """Time of decoding iterations here, over what the device takes for each."""
    requests = range(sequences)
    hops = (Hop(SELF, 0, num_layers), Hop(RING, num_layers, num_layers + 1))
    size = _PROMPT_TOKENS + CHECKED_ITERATIONS + 2
    opens = tuple(OpenRequest(request, hops, size, SamplingParams()) for request in requests)
    agent.runtime.accept(Work(opens=opens), None)
    ratios = []
    for past in range(_PROMPT_TOKENS, _PROMPT_TOKENS + CHECKED_ITERATIONS + 1):
        items = tuple(WorkItem(request, past, 1, sample=True, is_decode=True) for request in requests)
        payload = array.array("i", [1] * sequences).tobytes()
        begin = time.perf_counter()
        agent.send_to_peer(RING, Work(items=items), memoryview(payload))
        while not agent.turn(_TURN_TIMEOUT_MS):
            pass
        took_s = (time.perf_counter() - begin) / device.time_scale
        agent.discard_message(_TURN_TIMEOUT_MS)
        batch = BatchShape(0, 0, 0, sequences, sequences * (past + 1), sequences)
        ratios.append(took_s / cost.time_s(num_layers=num_layers, batch=batch, first=True, last=False))
    agent.runtime.accept(Work(closes=tuple(requests)), None)
    return ratios[1:]
