"""Profile a cluster: let every agent measure itself, measure every link, put it together as a ``ClusterProfile``."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from helixbench.errors import MeasurementError
from helixbench.profiler.cluster import COORDINATOR, ClusterProfile, Coordinator, Node
from helixbench.profiler.cost.fit import fit_cost
from helixbench.profiler.cost.model import GATHER_UP_TO_TOKENS
from helixbench.profiler.measure.pace import Pace
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.network.nics import Card, Direction
from helixbench.progress import Reporter
from helixbench.records import provenance_now, save_record
from helixbench.reference_server.profiling.config import ProfileConfig
from helixbench.reference_server.profiling.coordinator import measure_coordinator
from helixbench.reference_server.profiling.net_config import in_a_profile
from helixbench.reference_server.profiling.network import NetworkMeasured, NetworkMeasurement
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.keys import ClusterKey
from helixbench.reference_server.wire.messages import Describe, Description, Profile, Profiled

_PROFILE_SILENCE_S = 120.0  # an agent says how far it is every second, but loading can take long


def profile_cluster(config: ProfileConfig, key: ClusterKey, reporter: Reporter) -> ClusterProfile:
    """Measure the cluster and write its profile to ``config.output``.

    Raises:
        InputError: an agent is not there, or the model cannot be profiled on a node.
        MeasurementError: a number could not be measured.
    """
    files = ModelFiles(config.model)
    with Agents(config.addresses, key) as agents:
        agents.require_present()
        described = agents.ask({node: Describe() for node in config.addresses}, Description, timeout_s=10.0)
        network = _measure_network(agents, key, config, reporter)
        request = Profile(
            model=str(files.directory),
            model_digest=files.digest(),
            dtype=config.dtype,
            max_batch_tokens=config.max_batch_tokens,
            max_context_tokens=config.max_context_tokens,
            budget_s=config.budget_s,
        )
        measured = agents.ask(
            {
                node: request if node not in config.paces else _at_pace(request, config.paces[node])
                for node in config.addresses
            },
            Profiled,
            timeout_s=_PROFILE_SILENCE_S,
            on_progress=lambda node, progress: reporter.update(f"compute {node}", progress.done, progress.total),
        )
    times = measure_coordinator(key)
    nodes = [_node(node, described[node], measured[node], network.cards, config) for node in config.addresses]
    profile = ClusterProfile(
        model=files.facts(dtype=config.dtype),
        nodes=tuple(nodes),
        links=tuple(link.link() for link in network.links),
        coordinator=Coordinator(
            nic_out_bytes_per_s=_nic(COORDINATOR, network.cards, config, direction="out"),
            nic_in_bytes_per_s=_nic(COORDINATOR, network.cards, config, direction="in"),
            nic_source=_nic_source(COORDINATOR, network.cards, config),
            message_s=times.message_s,
            token_s=times.token_s,
            request_s=times.request_s,
        ),
        testbed=config.testbed,
        provenance=provenance_now(inputs={"model": files.digest()}, command=config.command),
    )
    save_record(config.output, profile)
    return profile


def _at_pace(request: Profile, pace: Pace) -> Profile:
    return msgspec.structs.replace(request, processor_speed=pace.speed, sensitivity=pace.sensitivity)


def _node(
    name: str,
    described: Description,
    measured: Profiled,
    cards: Sequence[Card],
    config: ProfileConfig,
) -> Node:
    cost = fit_cost(
        measured.samples,
        workspace_bytes=measured.workspace_bytes,
        max_batch_tokens=config.max_batch_tokens,
        source=measured.source,
        gather_up_to_tokens=GATHER_UP_TO_TOKENS[described.device.kind],
        row_sizes=measured.row_sizes,
        has_tiles=described.device.kind == "cuda",
    )
    cost = msgspec.structs.replace(cost, quality=measured.quality, pace=measured.pace)
    return Node(
        name=name,
        device=described.device,
        max_layers=measured.max_layers,
        versions=described.versions,
        nic_out_bytes_per_s=_nic(name, cards, config, direction="out"),
        nic_in_bytes_per_s=_nic(name, cards, config, direction="in"),
        nic_source=_nic_source(name, cards, config),
        cost=cost,
        region=config.regions.get(name, ""),
    )


def _nic(name: str, cards: Sequence[Card], config: ProfileConfig, *, direction: Direction) -> float | None:
    """What the card carries; ``None`` where the node's links bind before it does."""
    is_limited = name in config.limited_nics
    own = [card for card in cards if (card.node, card.direction) == (name, direction)]
    return own[0].limit_bytes_per_s(is_limited=is_limited) if own else None


def _nic_source(name: str, cards: Sequence[Card], config: ProfileConfig) -> str:
    is_limited = name in config.limited_nics
    said = [card.source(is_limited=is_limited) for card in cards if card.node == name]
    return "; ".join(source for source in said if source)


def _measure_network(agents: Agents, key: ClusterKey, config: ProfileConfig, reporter: Reporter) -> NetworkMeasured:
    """Links and cards, in little time.

    Raises:
        MeasurementError: not all links could be measured.
    """
    measured = NetworkMeasurement(agents, key, in_a_profile(config.link_seconds), on_progress=reporter.update).run()
    if measured.cut_short:
        raise MeasurementError(f"the links were not measured: {measured.cut_short}")
    for link in measured.links:
        if link.suspect:
            reporter.say(f"link {link.src} -> {link.dst} is doubtful: {link.suspect}")
    return measured
