"""Measure all links and NICs of a cluster: links in rounds until two attempts agree, then each node's links at once."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import msgspec

from helixbench.errors import MeasurementError
from helixbench.profiler.cluster import COORDINATOR, Link
from helixbench.profiler.network.links import agreed_bytes_per_s, disagreement
from helixbench.profiler.network.nics import Direction, Nic, make_nic
from helixbench.profiler.network.schedule import Pair, pack, rounds
from helixbench.reference_server.profiling.config import NetworkConfig
from helixbench.reference_server.profiling.links import measure_flows, measure_link
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.keys import ClusterKey
from helixbench.reference_server.wire.messages import (
    Flow,
    FlowsMeasured,
    IperfServe,
    IperfServing,
    LinkMeasured,
    MeasureFlows,
    MeasureLink,
)
from helixbench.reference_server.wire.transport import Transport, host_of

ANSWER_TIMEOUT_S = 60.0  # on top of the seconds of bandwidth that were asked for
TRANSPORT = "helixbench transport"
NicEnd = tuple[str, Direction]
CommandT = TypeVar("CommandT", MeasureLink, MeasureFlows)
AnswerT = TypeVar("AnswerT")


class NetworkMeasured(msgspec.Struct, frozen=True):
    """Links in the order of their nodes, and each node's NIC in both directions."""

    links: tuple[Link, ...]
    nics: tuple[Nic, ...]


def measure_network(
    agents: Agents, key: ClusterKey, config: NetworkConfig, *, on_progress: Callable[[str, float, float], None]
) -> NetworkMeasured:
    """Measure every directed pair of coordinator and nodes, then all NICs.

    Args:
        agents: connected, one per node.
        key: the cluster's, for the coordinator's own ends.
        config: how long and how often.
        on_progress: (what, done, total).

    Raises:
        MeasurementError: a link could not be measured, or an agent failed.
    """
    with closing(Transport(key)) as transport:
        measurement = _Measurement(agents, transport, config, on_progress)
        measurement.measure_links()
        pairs = [(src, dst) for src in measurement.names for dst in measurement.names if src != dst]
        links = tuple(measurement.link(pair) for pair in pairs)
        return NetworkMeasured(links, measurement.measure_nics())


class _Measurement:
    def __init__(
        self,
        agents: Agents,
        transport: Transport,
        config: NetworkConfig,
        on_progress: Callable[[str, float, float], None],
    ) -> None:
        self.names = (COORDINATOR, *agents.addresses)
        self._agents = agents
        self._transport = transport
        self._config = config
        self._on_progress = on_progress
        self._attempts: dict[Pair, list[LinkMeasured]] = {}  # pair -> what was measured, in order

    def measure_links(self) -> None:
        """Attempts by iperf3 until two of each pair agree; where they never do, the transport measures."""
        self._measure_in_rounds("links", rounds(self.names))
        for _ in range(1, self._config.max_attempts):
            self._measure_in_rounds("links again", pack(self._open_pairs()))
        self._measure_in_rounds("links by transport", pack(self._open_pairs()), by_iperf=False)

    def _open_pairs(self) -> list[Pair]:
        return [pair for pair in self._attempts if self._bandwidth(pair) is None]

    def _bandwidth(self, pair: Pair) -> float | None:
        """The agreed rate; the transport's counts at once, because it repeats its frames by itself."""
        by_transport = self._rates(pair, by_iperf=False)
        return by_transport[-1] if by_transport else agreed_bytes_per_s(self._rates(pair, by_iperf=True))

    def _rates(self, pair: Pair, *, by_iperf: bool) -> list[float]:
        rates = [(one.bandwidth_bytes_per_s, bool(one.iperf3)) for one in self._attempts[pair]]
        return [rate for rate, is_iperf in rates if rate is not None and is_iperf == by_iperf]

    def link(self, pair: Pair) -> Link:
        """The link that all attempts of a pair make.

        Raises:
            MeasurementError: none of them gave a bandwidth.
        """
        tried = self._attempts[pair]
        errors = [one.error for one in tried if one.error]
        bandwidth = self._bandwidth(pair)
        latencies = [one.latency_s for one in tried if one.latency_s is not None]
        if bandwidth is None or not latencies:
            raise MeasurementError(f"link {pair[0]} -> {pair[1]} could not be measured: {errors[-1]}")
        source = tried[-1].iperf3
        if not source:
            why = disagreement(self._rates(pair, by_iperf=True), errors)
            source = f"{TRANSPORT} (iperf3 {why or 'is missing'})"
        return Link(
            src=pair[0],
            dst=pair[1],
            bandwidth_bytes_per_s=bandwidth,
            latency_s=statistics.median(latencies),
            source=source,
            message_times=next((one.message_times for one in tried if one.message_times), ()),
        )

    def _measure_in_rounds(self, what: str, schedule: list[list[Pair]], *, by_iperf: bool = True) -> None:
        if self._config.one_pair_at_a_time:
            schedule = [[pair] for pairs in schedule for pair in pairs]
        for number, pairs in enumerate(schedule):
            self._measure_round(pairs, by_iperf=by_iperf)
            self._on_progress(what, number + 1, len(schedule))

    def _measure_round(self, pairs: Sequence[Pair], *, by_iperf: bool) -> None:
        """Start an iperf3 server at one end of each pair, then measure all pairs at the same time from the other."""
        serving = self._serve(Counter(_server_end(pair) for pair in pairs)) if by_iperf else {}
        clients: dict[str, Pair] = {}  # no node is twice in a round
        for pair in pairs:
            served = serving.get(_server_end(pair))
            if served is not None and served.error:
                failed = LinkMeasured(None, None, error=f"{_server_end(pair)}: {served.error}")
                self._attempts.setdefault(pair, []).append(failed)
            else:
                clients[_client_end(pair)] = pair
        measured = self._ask(
            {client: self._link_command(pair, serving.get(_server_end(pair))) for client, pair in clients.items()},
            LinkMeasured,
            seconds=self._config.seconds,
            own=lambda command: measure_link(self._transport, command),
        )
        for client, answer in measured.items():
            self._attempts.setdefault(clients[client], []).append(answer)

    def _link_command(self, pair: Pair, serving: IperfServing | None) -> MeasureLink:
        server, before = _server_end(pair), self._attempts.get(pair, [])
        rates = [one.bandwidth_bytes_per_s for one in before if one.bandwidth_bytes_per_s is not None]
        return MeasureLink(
            address=self._agents.addresses[server],
            iperf_port=next(iter(serving.ports), None) if serving is not None else None,
            seconds=self._config.seconds,
            reverse=server == pair[0],
            message_bytes=() if any(one.message_times for one in before) else self._config.message_bytes,
            message_limit_s=self._config.message_limit_s,
            rough_bytes_per_s=rates[-1] if rates else None,
        )

    def measure_nics(self) -> tuple[Nic, ...]:
        """All that one node sends at once together with all that another receives, until each did both.

        Never both directions of one NIC: acknowledgements of what it receives would queue behind what it sends.
        """
        alone = {pair: rate for pair in self._attempts if (rate := self._bandwidth(pair)) is not None}
        following = [*self.names[1:], *self.names[:1]]
        turns: list[tuple[NicEnd, NicEnd]] = [
            ((name, "out"), (other, "in")) for name, other in zip(self.names, following, strict=True)
        ]
        nics: list[Nic | None] = []
        for number, ends in enumerate(turns):
            at_once, problem = self._measure_at_once(ends, alone)
            nics += [make_nic(name, direction, alone, at_once, problem=problem) for name, direction in ends]
            self._on_progress("NICs", number + 1, len(turns))
        found = [nic for nic in nics if nic is not None]
        return tuple(sorted(found, key=lambda nic: (self.names.index(nic.node), nic.direction == "in")))

    def _measure_at_once(self, ends: Iterable[NicEnd], alone: Mapping[Pair, float]) -> tuple[dict[Pair, float], str]:
        """Bytes/s of all pairs at these ends while all are busy; none, and why, where that cannot be measured."""
        pairs = [pair for pair in alone if (pair[0], "out") in ends or (pair[1], "in") in ends]
        if len(self.names) < 3:
            return {}, "it has one link"
        if not all(self._attempts[pair][-1].iperf3 for pair in pairs):
            return {}, "iperf3 did not measure all of its links"
        serving = self._serve(Counter(_server_end(pair) for pair in pairs))
        problem = "; ".join(f"{name}: {answer.error}" for name, answer in serving.items() if answer.error)
        if problem or not all(answer.ports for answer in serving.values()):
            return {}, problem or "iperf3 did not start"
        ports = {name: list(answer.ports) for name, answer in serving.items()}
        flows: dict[str, dict[Pair, Flow]] = {}  # client -> its flows
        for pair in pairs:
            server = _server_end(pair)
            flows.setdefault(_client_end(pair), {})[pair] = Flow(
                host_of(self._agents.addresses[server]),
                ports[server].pop(),
                reverse=server == pair[0],
                rough_bytes_per_s=alone[pair] / (len(self.names) - 1),
            )
        measured = self._ask(
            {client: MeasureFlows(tuple(own.values()), self._config.nic_seconds) for client, own in flows.items()},
            FlowsMeasured,
            seconds=self._config.nic_seconds,
            own=measure_flows,
        )
        rates: dict[Pair, float] = {}
        for client, answer in measured.items():
            if answer.error:
                return {}, answer.error
            rates |= dict(zip(flows[client], answer.bytes_per_s, strict=True))
        return rates, ""

    def _ask(
        self,
        commands: Mapping[str, CommandT],
        expected: type[AnswerT],
        *,
        seconds: float,
        own: Callable[[CommandT], AnswerT],
    ) -> dict[str, AnswerT]:
        """Ask all clients at the same time; the coordinator, which has no agent, does ``own`` in a thread."""
        timeout_s = seconds + ANSWER_TIMEOUT_S
        to_agents = {client: command for client, command in commands.items() if client != COORDINATOR}
        with ThreadPoolExecutor(1) as thread:
            if COORDINATOR in commands:
                mine = thread.submit(own, commands[COORDINATOR])
            answers = self._agents.ask(to_agents, expected, timeout_s=timeout_s)
            if COORDINATOR in commands:
                answers[COORDINATOR] = mine.result()
        return answers

    def _serve(self, counts: Mapping[str, int]) -> dict[str, IperfServing]:
        """Start that many iperf3 servers on each node."""
        return self._agents.ask(
            {node: IperfServe(count) for node, count in counts.items()}, IperfServing, timeout_s=ANSWER_TIMEOUT_S
        )


def _client_end(pair: Pair) -> str:
    """The end that runs the iperf3 client: the receiver, whose rates are of what arrived; else the coordinator.

    The coordinator has no agent to start a server, so it is always the client.
    """
    return COORDINATOR if COORDINATOR in pair else pair[1]


def _server_end(pair: Pair) -> str:
    return pair[0] if pair[1] == _client_end(pair) else pair[1]
