"""Profile a cluster: measure all links and NICs, let every agent measure itself, fit costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TypeVar

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import (
    COORDINATOR,
    STAGE_TIMES_FACT,
    ClusterProfile,
    Coordinator,
    Device,
    Link,
    MessageTime,
    Node,
)
from helixbench.profiler.cost.fit import fit_cost
from helixbench.profiler.cost.model import GATHER_UP_TO_TOKENS
from helixbench.profiler.model.model import Model, open_model
from helixbench.profiler.network.nics import Nic
from helixbench.progress import Reporter
from helixbench.records import load_record, provenance_now, save_measurement
from helixbench.reference_server.profiling.config import DEFAULT_RANGES, NodeProfileConfig, ProfileConfig
from helixbench.reference_server.profiling.coordinator import measure_coordinator
from helixbench.reference_server.profiling.links import measure_transport
from helixbench.reference_server.profiling.network import NetworkMeasured, measure_network
from helixbench.reference_server.testbed.emulation import Timing, require_time_scale
from helixbench.reference_server.testbed.wiring import SHAPED
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.keys import ClusterKey
from helixbench.reference_server.wire.messages import Description, Done, OpenModel, Profile, Profiled
from helixbench.reference_server.wire.transport import Transport

_PROFILE_SILENCE_S = 120.0  # an agent reports progress every second, but loading can take long
_CHECKED_AT_ONCE = 4
EndT = TypeVar("EndT", Node, Coordinator)


def profile_cluster(config: ProfileConfig, key: ClusterKey, reporter: Reporter) -> ClusterProfile:
    """Profile the cluster, or its network alone, and write the profile to ``config.output``.

    Raises:
        InputError: an agent is not there, or the model cannot be profiled on a node.
        MeasurementError: a number could not be measured.
    """
    files = open_model(config.model)
    kept = _kept_compute(config, files)
    with Agents(config.addresses, key) as agents:
        described = agents.describe()
        require_time_scale(described, config.timing)
        network = _network(agents, key, config, reporter)
        if kept is not None:
            nodes, coordinator = kept.nodes, kept.coordinator
        elif config.is_network_only:
            nodes, coordinator = (
                tuple(_without_layers(name, described[name]) for name in config.addresses),
                Coordinator(),
            )
        else:
            measured: dict[str, Profiled] = {}
            opening = OpenModel(str(files.directory), files.digest())
            agents.ask(dict.fromkeys(described, opening), Done, timeout_s=_PROFILE_SILENCE_S)
            commands = {
                name: profile_command(files, config, device_kind=answer.device.kind)
                for name, answer in described.items()
            }
            for turn in profiling_turns(described):
                measured |= agents.ask(
                    {name: commands[name] for name in turn},
                    Profiled,
                    timeout_s=_PROFILE_SILENCE_S,
                    on_progress=lambda node, progress: reporter.update(
                        f"compute {node}", progress.done, progress.total
                    ),
                )
            nodes = tuple(
                fitted_node(name, described[name].device, described[name].versions, measured[name], commands[name])
                for name in config.addresses
            )
            coordinator = _coordinator_in_device_time(measure_coordinator(key), config.timing)
    profile = ClusterProfile(
        model=files.facts(dtype=config.dtype) if kept is None else kept.model,
        nodes=tuple(
            msgspec.structs.replace(
                _with_nic(node, node.name, network.nics, config), region=config.regions.get(node.name, node.region)
            )
            for node in nodes
        ),
        links=network.links,
        coordinator=_with_nic(coordinator, COORDINATOR, network.nics, config),
        testbed=config.testbed,
        provenance=provenance_now(inputs={"model": files.digest()}, command=config.command),
    )
    save_measurement(config.output, profile)
    return profile


def profiling_turns(described: Mapping[str, Description]) -> list[tuple[str, ...]]:
    """Which nodes are profiled at once: all real devices, and of emulated ones a few.

    Emulated nodes share the cores of a machine, and what is checked is their own time, not that of a crowd.
    """
    emulated = [name for name, answer in described.items() if answer.device.kind == "emulated"]
    real = tuple(name for name in described if name not in emulated)
    turns = [tuple(emulated[i : i + _CHECKED_AT_ONCE]) for i in range(0, len(emulated), _CHECKED_AT_ONCE)]
    return [real, *turns] if real else turns


def profile_command(files: Model, config: ProfileConfig | NodeProfileConfig, *, device_kind: str) -> Profile:
    """The command by which an agent with such a device measures itself; no longer contexts than the model has."""
    batch_tokens, context_tokens = DEFAULT_RANGES[device_kind]
    if files.max_sequence_tokens is not None:
        context_tokens = min(context_tokens, files.max_sequence_tokens)
    return Profile(
        model=str(files.directory),
        model_digest=files.digest(),
        dtype=config.dtype,
        max_batch_tokens=config.max_batch_tokens or batch_tokens,
        max_context_tokens=config.max_context_tokens or context_tokens,
        budget_s=config.budget_s,
    )


def fitted_node(
    name: str,
    device: Device,
    versions: dict[str, str],
    measured: Profiled,
    command: Profile,
) -> Node:
    """The node of what an agent measured: its cost fitted, or an emulated device's own."""
    cost = measured.cost
    if cost is None:
        cost = fit_cost(
            measured.samples,
            workspace_bytes=measured.workspace_bytes,
            max_batch_tokens=command.max_batch_tokens,
            source=measured.source,
            gather_up_to_tokens=GATHER_UP_TO_TOKENS[device.kind],
            has_tiles=device.kind == "cuda",
        )
        cost = msgspec.structs.replace(cost, quality=measured.quality)
    else:
        device = msgspec.structs.replace(device, facts=device.facts | {STAGE_TIMES_FACT: measured.origin})
    return Node(name=name, device=device, max_layers=measured.max_layers, versions=versions, cost=cost)


def _network(agents: Agents, key: ClusterKey, config: ProfileConfig, reporter: Reporter) -> NetworkMeasured:
    """Links and NICs in the devices' time: as the testbed shapes them where it says so, else measured."""
    timing = config.timing
    if not config.shaped_links:
        measured = measure_network(agents, key, config.network, on_progress=reporter.update)
        links = tuple(_link_in_device_time(link, timing) for link in measured.links)
        return NetworkMeasured(links, tuple(nic.scaled(timing.time_scale) for nic in measured.nics))
    rates = {
        agents.addresses[link.dst]: link.bandwidth_bytes_per_s / timing.time_scale
        for link in config.shaped_links
        if link.src == COORDINATOR
    }
    with closing(Transport(key)) as transport:
        own = measure_transport(transport, rates)
    links = tuple(
        msgspec.structs.replace(
            link,
            latency_s=link.latency_s + own.message_s / timing.time_scale,
            transport_byte_s=own.byte_s / timing.time_scale,
        )
        for link in config.shaped_links
    )
    return NetworkMeasured(links, ())


def _link_in_device_time(link: Link, timing: Timing) -> Link:
    """A link that was measured here; messages were not held meanwhile."""
    scale, held_s = timing.time_scale, timing.latency_s.get(link.src, {}).get(link.dst, 0.0)
    return msgspec.structs.replace(
        link,
        bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * scale,
        latency_s=link.latency_s / scale + held_s,
        message_times=tuple(
            MessageTime(time.message_bytes, time.one_way_s / scale + held_s) for time in link.message_times
        ),
    )


def _coordinator_in_device_time(measured: Coordinator, timing: Timing) -> Coordinator:
    """Times of the coordinator, which works as fast as this machine whatever the time scale."""
    times = {
        field: None if (seconds := getattr(measured, field)) is None else seconds / timing.time_scale
        for field in ("message_s", "token_s", "request_s")
    }
    return msgspec.structs.replace(measured, **times)


def _kept_compute(config: ProfileConfig, files: Model) -> ClusterProfile | None:
    """The profile whose compute is kept, where one is named.

    Raises:
        InputError: it is of other nodes or of another model.
    """
    if config.compute_of is None:
        return None
    kept = load_record(config.compute_of, ClusterProfile)
    names = {node.name for node in kept.nodes}
    if kept.model.digest != files.digest() or names != set(config.addresses):
        raise InputError(
            f"--compute-of {config.compute_of}: holds model {kept.model.name} on {', '.join(sorted(names))}; "
            f"need the model and the nodes to be profiled ({', '.join(config.addresses)})"
        )
    return kept


def _without_layers(name: str, described: Description) -> Node:
    """A node whose compute was not measured: it holds no layers."""
    return Node(name=name, device=described.device, max_layers=0, capacity_tokens_per_s=(), versions=described.versions)


def _with_nic(end: EndT, name: str, nics: Sequence[Nic], config: ProfileConfig) -> EndT:
    """NIC limits where the NIC binds before the node's links do."""
    if config.shaped_links:
        rate = config.shaped_nics.get(name)
        source = "" if rate is None else SHAPED
        return msgspec.structs.replace(end, nic_out_bytes_per_s=rate, nic_in_bytes_per_s=rate, nic_source=source)
    is_limited = name in config.limited_nics
    own = [nic for nic in nics if nic.node == name]
    limits = {f"nic_{nic.direction}_bytes_per_s": nic.limit_bytes_per_s(is_limited=is_limited) for nic in own}
    sources = [source for nic in own if (source := nic.source(is_limited=is_limited))]
    return msgspec.structs.replace(end, **limits, nic_source="; ".join(sources))
