"""Profile a cluster: let every agent measure itself, measure every link, put it together as a ``ClusterProfile``."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import COORDINATOR, ClusterProfile, Coordinator, Node
from helixbench.profiler.cost.fit import fit_cost
from helixbench.profiler.cost.model import GATHER_UP_TO_TOKENS
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.network.nics import Direction, Nic
from helixbench.progress import Reporter
from helixbench.records import load_record, provenance_now, save_record
from helixbench.reference_server.profiling.config import ProfileConfig
from helixbench.reference_server.profiling.coordinator import measure_coordinator
from helixbench.reference_server.profiling.network import measure_network
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.keys import ClusterKey
from helixbench.reference_server.wire.messages import Description, Profile, Profiled

_PROFILE_SILENCE_S = 120.0  # an agent says how far it is every second, but loading can take long


def profile_cluster(config: ProfileConfig, key: ClusterKey, reporter: Reporter) -> ClusterProfile:
    """Measure the cluster and write its profile to ``config.output``.

    Raises:
        InputError: an agent is not there, or the model cannot be profiled on a node.
        MeasurementError: a number could not be measured.
    """
    files = ModelFiles(config.model)
    with Agents(config.addresses, key) as agents:
        described = agents.describe()
        network = measure_network(agents, key, config.network, on_progress=reporter.update)
        request = Profile(
            model=str(files.directory),
            model_digest=files.digest(),
            dtype=config.dtype,
            max_batch_tokens=config.max_batch_tokens,
            max_context_tokens=config.max_context_tokens,
            budget_s=config.budget_s,
        )
        measured = agents.ask(
            dict.fromkeys(config.addresses, request),
            Profiled,
            timeout_s=_PROFILE_SILENCE_S,
            on_progress=lambda node, progress: reporter.update(f"compute {node}", progress.done, progress.total),
        )
    times = measure_coordinator(key)
    nodes = [_node(node, described[node], measured[node], network.nics, config) for node in config.addresses]
    profile = ClusterProfile(
        model=files.facts(dtype=config.dtype),
        nodes=tuple(nodes),
        links=network.links,
        coordinator=Coordinator(
            nic_out_bytes_per_s=_nic(COORDINATOR, network.nics, config, direction="out"),
            nic_in_bytes_per_s=_nic(COORDINATOR, network.nics, config, direction="in"),
            nic_source=_nic_source(COORDINATOR, network.nics, config),
            message_s=times.message_s,
            token_s=times.token_s,
            request_s=times.request_s,
        ),
        testbed=config.testbed,
        provenance=provenance_now(inputs={"model": files.digest()}, command=config.command),
    )
    save_record(config.output, profile)
    return profile


def _node(
    name: str,
    described: Description,
    measured: Profiled,
    nics: Sequence[Nic],
    config: ProfileConfig,
) -> Node:
    cost = fit_cost(
        measured.samples,
        workspace_bytes=measured.workspace_bytes,
        max_batch_tokens=config.max_batch_tokens,
        source=measured.source,
        gather_up_to_tokens=GATHER_UP_TO_TOKENS[described.device.kind],
        has_tiles=described.device.kind == "cuda",
    )
    cost = msgspec.structs.replace(cost, quality=measured.quality)
    return Node(
        name=name,
        device=described.device,
        max_layers=measured.max_layers,
        versions=described.versions,
        nic_out_bytes_per_s=_nic(name, nics, config, direction="out"),
        nic_in_bytes_per_s=_nic(name, nics, config, direction="in"),
        nic_source=_nic_source(name, nics, config),
        cost=cost,
        region=config.regions.get(name, ""),
    )


def _nic(name: str, nics: Sequence[Nic], config: ProfileConfig, *, direction: Direction) -> float | None:
    """Bytes/s that the NIC carries; ``None`` where the node's links bind before it does."""
    is_limited = name in config.limited_nics
    own = [nic for nic in nics if (nic.node, nic.direction) == (name, direction)]
    return own[0].limit_bytes_per_s(is_limited=is_limited) if own else None


def _nic_source(name: str, nics: Sequence[Nic], config: ProfileConfig) -> str:
    sources = [nic.source(is_limited=name in config.limited_nics) for nic in nics if nic.node == name]
    return "; ".join(source for source in sources if source)


def profile_network(config: ProfileConfig, key: ClusterKey, reporter: Reporter) -> ClusterProfile:
    """Measure links and NICs alone and write them to ``config.output``.

    The nodes' compute is that of the profile ``config.compute_of``; without one they hold no layers.

    Raises:
        InputError: an agent is not there, or that profile has other nodes or another model.
        MeasurementError: a link could not be measured.
    """
    files = ModelFiles(config.model)
    kept = None if config.compute_of is None else load_record(config.compute_of, ClusterProfile)
    if kept is not None and (kept.model.digest, {n.name for n in kept.nodes}) != (
        files.digest(),
        set(config.addresses),
    ):
        raise InputError(
            f"--compute-of {config.compute_of}: its model {kept.model.name} and nodes "
            f"{', '.join(node.name for node in kept.nodes)} are not those to be profiled"
        )
    with Agents(config.addresses, key) as agents:
        described = agents.describe()
        network = measure_network(agents, key, config.network, on_progress=reporter.update)
    nodes = []
    for name, description in described.items():
        nics = {
            "nic_out_bytes_per_s": _nic(name, network.nics, config, direction="out"),
            "nic_in_bytes_per_s": _nic(name, network.nics, config, direction="in"),
            "nic_source": _nic_source(name, network.nics, config),
        }
        node = Node(
            name=name,
            device=description.device,
            max_layers=0,
            capacity_tokens_per_s=(),
            versions=description.versions,
            region=config.regions.get(name, ""),
        )
        nodes.append(msgspec.structs.replace(node if kept is None else kept.node(name), **nics))
    coordinator = Coordinator() if kept is None else kept.coordinator
    profile = ClusterProfile(
        model=files.facts(dtype=config.dtype) if kept is None else kept.model,
        nodes=tuple(nodes),
        links=network.links,
        coordinator=msgspec.structs.replace(
            coordinator,
            nic_out_bytes_per_s=_nic(COORDINATOR, network.nics, config, direction="out"),
            nic_in_bytes_per_s=_nic(COORDINATOR, network.nics, config, direction="in"),
            nic_source=_nic_source(COORDINATOR, network.nics, config),
        ),
        testbed=config.testbed,
        provenance=provenance_now(inputs={"model": files.digest()}, command=config.command),
    )
    save_record(config.output, profile)
    return profile
