"""Profile this machine's own device: an agent in this process measures itself, as those of a cluster do."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.profiler.machine import library_versions
from helixbench.profiler.measure.sampler import MIN_ROUNDS, Block, least_seconds
from helixbench.profiler.model.model import Model, open_model
from helixbench.profiler.staleness import identity_of
from helixbench.records import load_record, provenance_now, save_record
from helixbench.reference_server.node.agent import Agent, AgentConfig
from helixbench.reference_server.profiling import node as self_profile
from helixbench.reference_server.profiling.cluster import fitted_node, profile_command
from helixbench.reference_server.profiling.config import NodeProfileConfig
from helixbench.reference_server.wire.keys import make_key_file
from helixbench.reference_server.wire.messages import Profile


class PartialProfile(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.partial-profile/3",
):
    """Blocks of an interrupted run, valid for another run with the same ``made_of``."""

    made_of: dict[str, str]
    blocks: tuple[Block, ...]


class NodeTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted time of a profile: ``prepare_s`` to load, ``least_s`` for the first rounds.

    Noisy points then use up the budget.
    """

    num_points: int
    num_held_out: int
    num_rounds: int
    num_layers: int
    prepare_s: float
    least_s: float
    budget_s: float


def profile_node(
    config: NodeProfileConfig,
    *,
    partial: Path,
    resume: bool,
    on_block: Callable[[int, int], None] = lambda _done, _expected: None,
) -> ClusterProfile:
    """Profile the device as a cluster of one node without links.

    Args:
        config: what to measure.
        partial: file that keeps the blocks after each round; removed at the end.
        resume: start with the blocks in that file.
        on_block: called with (blocks done, expected).

    Raises:
        InputError: the model cannot be profiled here, or the blocks are of another run.
        MeasurementError: a number could not be measured.
    """
    with agent_here(config) as (agent, command, files):
        made_of = _made_of(agent, command)
        measured = self_profile.profile(
            agent,
            command,
            taken=_kept(partial, made_of).blocks if resume else (),
            on_block=on_block,
            on_round=lambda blocks: save_record(partial, PartialProfile(made_of=made_of, blocks=blocks)),
        )
        device = agent.device
    node = fitted_node(config.name, device, library_versions(), measured, command)
    partial.unlink(missing_ok=True)
    return ClusterProfile(
        model=files.facts(dtype=config.dtype),
        nodes=(node,),
        provenance=provenance_now(inputs={"model": files.digest()}, command=config.command),
    )


def plan_node(config: NodeProfileConfig) -> NodeTimes:
    """Predict size and time of a profile from a few iterations of a small and a large batch.

    Raises:
        InputError: the model cannot be profiled here.
    """
    began = time.perf_counter()
    with agent_here(config) as (agent, command, _), self_profile.prepared(agent, command) as ready:
        prepare_s = time.perf_counter() - began
        layers = [p for p in ready.points if p.part == "layers" and p.num_layers == ready.num_layers]
        small, large = (pick(layers, key=lambda p: (p.num_tokens, p.kv_tokens)) for pick in (min, max))
        timed = []
        for point in (small, large):
            with ready.ring.run(point) as iterate:
                iterate()
                begin = time.perf_counter()
                iterate()
                timed.append((float(point.num_tokens), time.perf_counter() - begin))
        return NodeTimes(
            num_points=len(ready.points),
            num_held_out=sum(point.held_out for point in ready.points),
            num_rounds=MIN_ROUNDS,
            num_layers=ready.num_layers,
            prepare_s=prepare_s,
            least_s=least_seconds(ready.points, first=timed[0], second=timed[1]),
            budget_s=config.budget_s,
        )


@contextlib.contextmanager
def agent_here(config: NodeProfileConfig) -> Iterator[tuple[Agent, Profile, Model]]:
    """An agent in this process, as ``helixbench agent`` starts it, with the command to profile itself."""
    files = open_model(config.model)
    command = profile_command(files, config, device_kind=config.device.partition(":")[0])
    with tempfile.TemporaryDirectory(prefix="helixbench-") as folder:
        key = Path(folder) / "cluster.key"
        make_key_file(key)
        started = AgentConfig(
            listen="127.0.0.1:0",
            key=key,
            device=config.device,
            memory_bytes=config.memory_bytes,
            threads=config.threads,
        )
        agent = Agent(started)
        try:
            yield agent, command, files
        finally:
            agent.close()


def _made_of(agent: Agent, command: Profile) -> dict[str, str]:
    """What two runs must share to be parts of one profile; the budget may differ."""
    options = {
        "model": command.model_digest,
        "dtype": command.dtype,
        "largest batch": str(command.max_batch_tokens),
        "longest context": str(command.max_context_tokens),
        "memory": str(agent.device.memory_bytes),
    }
    versions = library_versions()
    return options | identity_of(agent.device, versions) | versions


def _kept(partial: Path, made_of: dict[str, str]) -> PartialProfile:
    """The blocks of an interrupted run of the same profile.

    Raises:
        InputError: there are none, or they are of another profile.
    """
    if not partial.exists():
        raise InputError(f"{partial}: nothing to resume; leave out --resume")
    kept = load_record(partial, PartialProfile)
    differing = [
        f"{name}: {kept.made_of.get(name, 'not stated')} then, {made_of.get(name, 'not stated')} now"
        for name in sorted(kept.made_of.keys() | made_of.keys())
        if kept.made_of.get(name) != made_of.get(name)
    ]
    if differing:
        raise InputError(f"{partial}: is of another profile ({'; '.join(differing)}); leave out --resume")
    return kept
