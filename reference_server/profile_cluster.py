"""Profile a cluster: let every agent measure itself, measure every link, put it together as a ``ClusterProfile``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from profiler.cluster_profile import COORDINATOR, ClusterProfile, Coordinator, Link, Node
from profiler.errors import MeasurementError
from profiler.fit import fit_cost
from profiler.model_files import ModelFiles
from profiler.network import rounds
from profiler.records import provenance_now, save_record

from .client import Agents
from .coordinator_cost import measure_coordinator
from .dtypes import torch_dtype
from .keys import ClusterKey
from .link_probe import measure_link
from .messages import (
    Describe,
    Description,
    IperfServe,
    IperfServing,
    LinkMeasured,
    MeasureLink,
    Profile,
    Profiled,
)
from .profile_config import ProfileConfig
from .progress import Reporter
from .transport import Transport

_LINK_TIMEOUT_S = 60.0
_PROFILE_SILENCE_S = 120.0  # an agent says how far it is every second, but loading can take long


def profile_cluster(config: ProfileConfig, key: ClusterKey, reporter: Reporter) -> ClusterProfile:
    """Measure the cluster and write its profile to ``config.output``.

    Raises:
        InputError: an agent is not there, or the model cannot be profiled on a node.
        MeasurementError: a number could not be measured.
    """
    files = ModelFiles(config.model)
    dtype = torch_dtype(config.dtype)
    with Agents(config.addresses, key) as agents:
        agents.require_present()
        described = agents.ask({node: Describe() for node in config.addresses}, Description, timeout_s=10.0)
        links = _measure_links(agents, key, config, reporter)
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
    nodes = [_node(node, described[node], measured[node], links, config) for node in config.addresses]
    profile = ClusterProfile(
        model=files.facts(dtype=dtype),
        nodes=tuple(nodes),
        links=links,
        coordinator=Coordinator(
            nic_out_bytes_per_s=_nic(COORDINATOR, links, config, is_out=True),
            nic_in_bytes_per_s=_nic(COORDINATOR, links, config, is_out=False),
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
    links: tuple[Link, ...],
    config: ProfileConfig,
) -> Node:
    cost = fit_cost(
        measured.samples,
        workspace_bytes=measured.workspace_bytes,
        max_batch_tokens=config.max_batch_tokens,
        source=measured.source,
    )
    return Node(
        name=name,
        device=described.device,
        max_layers=measured.max_layers,
        nic_out_bytes_per_s=_nic(name, links, config, is_out=True),
        nic_in_bytes_per_s=_nic(name, links, config, is_out=False),
        cost=cost,
        region=config.regions.get(name, ""),
    )


def _nic(name: str, links: tuple[Link, ...], config: ProfileConfig, *, is_out: bool) -> float | None:
    if name not in config.limited_nics:
        return None
    return max(link.bandwidth_bytes_per_s for link in links if (link.src if is_out else link.dst) == name)


def _measure_links(agents: Agents, key: ClusterKey, config: ProfileConfig, reporter: Reporter) -> tuple[Link, ...]:
    """Every directed pair, in rounds in which no node takes part twice."""
    schedule = rounds([COORDINATOR, *config.addresses])
    links: list[Link] = []
    for number, pairs in enumerate(schedule):
        links += _measure_round(agents, key, pairs, config)
        reporter.update("links", number + 1, len(schedule))
    order = [COORDINATOR, *config.addresses]
    return tuple(sorted(links, key=lambda link: (order.index(link.src), order.index(link.dst))))


def _measure_round(agents: Agents, key: ClusterKey, pairs: list[tuple[str, str]], config: ProfileConfig) -> list[Link]:
    """One round: iperf3 servers at the far ends, then all pairs at once; the coordinator measures its own."""
    far_ends = {_far_end(pair): IperfServe() for pair in pairs}
    serving = agents.ask(far_ends, IperfServing, timeout_s=_LINK_TIMEOUT_S)
    own: list[tuple[tuple[str, str], MeasureLink]] = []
    asked: dict[str, tuple[tuple[str, str], MeasureLink]] = {}  # near end -> (pair, command)
    for src, dst in pairs:
        far = _far_end((src, dst))
        command = MeasureLink(
            address=agents.addresses[far],
            iperf_port=serving[far].port,
            seconds=config.link_seconds,
            reverse=far == src,
        )
        if COORDINATOR in (src, dst):
            own.append(((src, dst), command))
        else:
            asked[src] = ((src, dst), command)
    results: dict[tuple[str, str], LinkMeasured] = {}
    worker = _Background(lambda: results.update(_measure_own(key, own)))
    answers = agents.ask(
        {node: command for node, (_, command) in asked.items()}, LinkMeasured, timeout_s=_LINK_TIMEOUT_S
    )
    worker.join()
    results.update({pair: answers[node] for node, (pair, _) in asked.items()})
    return [
        Link(
            src=src,
            dst=dst,
            bandwidth_bytes_per_s=result.bandwidth_bytes_per_s,
            latency_s=result.latency_s,
            source=result.bandwidth_source,
        )
        for (src, dst), result in results.items()
    ]


def _far_end(pair: tuple[str, str]) -> str:
    """The end that serves iperf3: the one that is not the coordinator, which has no agent to be asked."""
    return pair[0] if pair[1] == COORDINATOR else pair[1]


def _measure_own(
    key: ClusterKey, own: list[tuple[tuple[str, str], MeasureLink]]
) -> Mapping[tuple[str, str], LinkMeasured]:
    transport = Transport(key)
    try:
        return {pair: measure_link(transport, command) for pair, command in own}
    finally:
        transport.close()


class _Background:
    """A function in a thread of its own; ``join`` raises what it raised."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._error: Exception | None = None
        self._function = function
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._function()
        except Exception as error:
            self._error = error

    def join(self) -> None:
        self._thread.join(_LINK_TIMEOUT_S)
        if self._thread.is_alive():
            raise MeasurementError(f"the coordinator's own link was not measured within {_LINK_TIMEOUT_S:.0f} s")
        if self._error is not None:
            raise self._error
