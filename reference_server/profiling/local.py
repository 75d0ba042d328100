"""Profile this machine's own device: an agent in this process measures itself, as a cluster's agents do."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile, Node
from helixbench.profiler.cost.fit import fit_cost
from helixbench.profiler.cost.model import GATHER_UP_TO_TOKENS
from helixbench.profiler.machine import library_versions
from helixbench.profiler.measure.sampler import MIN_ROUNDS, Block, least_seconds
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage.stage import preload
from helixbench.profiler.staleness import identity_of
from helixbench.records import load_record, provenance_now, save_record
from helixbench.reference_server.node.agent import Agent, AgentConfig, use_processors
from helixbench.reference_server.profiling import node as self_profile
from helixbench.reference_server.wire.keys import make_key_file
from helixbench.reference_server.wire.messages import Profile


class NodeProfileConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure, where. ``threads`` as in ``AgentConfig``; ``command`` is the user's."""

    model: str
    dtype: str
    name: str
    device: str = "cpu"
    memory_bytes: float | None = None
    threads: int | None = None
    max_batch_tokens: int = 128
    max_context_tokens: int = 512
    budget_s: float = 100.0
    command: str = ""


class PartialProfile(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.partial-profile/3",
):
    """Blocks of an interrupted run. ``made_of`` is what has to be the same for them to count."""

    made_of: dict[str, str]
    blocks: tuple[Block, ...]


class NodeTimes(msgspec.Struct, frozen=True, kw_only=True):
    """What measuring would take. ``least_s`` is for the first rounds; noisy points use up the budget.

    ``prepare_s`` goes before them: loading.
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
    """Measure the device: a cluster of one node, without links.

    Args:
        config: what to measure.
        partial: where blocks are kept after each round; removed at the end.
        resume: start with the blocks kept there.
        on_block: told (blocks done, expected).

    Raises:
        InputError: the model cannot be profiled here, or what is to be resumed was another run.
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
    cost = fit_cost(
        measured.samples,
        workspace_bytes=measured.workspace_bytes,
        max_batch_tokens=config.max_batch_tokens,
        source=measured.source,
        gather_up_to_tokens=GATHER_UP_TO_TOKENS[device.kind],
        has_tiles=device.kind == "cuda",
    )
    node = Node(
        name=config.name,
        device=device,
        max_layers=measured.max_layers,
        versions=library_versions(),
        cost=msgspec.structs.replace(cost, quality=measured.quality),
    )
    partial.unlink(missing_ok=True)
    return ClusterProfile(
        model=files.facts(dtype=config.dtype),
        nodes=(node,),
        provenance=provenance_now(inputs={"model": files.digest()}, command=config.command),
    )


def plan_node(config: NodeProfileConfig) -> NodeTimes:
    """How much would be measured and about how long it takes, from a few iterations of a small and a large batch.

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
def agent_here(config: NodeProfileConfig) -> Iterator[tuple[Agent, Profile, ModelFiles]]:
    """An agent as ``helixbench agent`` starts it, in this process, and what it is to measure."""
    preload()
    files = ModelFiles(config.model)
    command = Profile(
        model=str(files.directory),
        model_digest=files.digest(),
        dtype=config.dtype,
        max_batch_tokens=config.max_batch_tokens,
        max_context_tokens=config.max_context_tokens,
        budget_s=config.budget_s,
    )
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
        use_processors(started)
        agent = Agent(started)
        try:
            yield agent, command, files
        finally:
            agent.close()


def _made_of(agent: Agent, command: Profile) -> dict[str, str]:
    """What two parts of one profile have in common; the budget may differ."""
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
    """What was kept there, checked to be of the same profile.

    Raises:
        InputError: it is not.
    """
    if not partial.exists():
        raise InputError(f"{partial}: nothing to resume; leave out --resume")
    kept = load_record(partial, PartialProfile)
    differing = [
        f"{name}: {kept.made_of.get(name, 'not said')} then, {made_of.get(name, 'not said')} now"
        for name in sorted(kept.made_of.keys() | made_of.keys())
        if kept.made_of.get(name) != made_of.get(name)
    ]
    if differing:
        raise InputError(f"{partial}: begun as another profile ({'; '.join(differing)}); leave out --resume")
    return kept
