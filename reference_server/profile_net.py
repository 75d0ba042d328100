"""Measure a cluster's links and network cards: rounds of pairs, doubtful ones again, then each node's links at once."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import msgspec

from profiler.cluster_profile import COORDINATOR
from profiler.errors import HelixbenchError, MeasurementError
from profiler.net_cards import Card, Direction, make_card
from profiler.net_records import MeasuredLink
from profiler.net_schedule import Pair, pack, rounds
from profiler.net_suspects import Attempt, Doubt, bandwidth_of, confirmed_oddity, find_doubts

from .client import Agents
from .keys import ClusterKey
from .link_messages import Flow, FlowsMeasured, IperfServe, IperfServing, LinkMeasured, MeasureFlows, MeasureLink
from .link_probe import TRANSPORT_SOURCE, measure_flows, measure_link
from .net_config import NetConfig
from .transport import Transport

ANSWER_TIMEOUT_S = 60.0
_SERVE_TIMEOUT_S = 30.0
ResultT = TypeVar("ResultT")


class NetworkMeasured(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; ``cut_short`` says why not all of it was."""

    links: tuple[MeasuredLink, ...]
    cards: tuple[Card, ...]
    seconds: float
    cut_short: str = ""


class NetworkMeasurement:
    """One measurement of a cluster's network; keeps what it has when it is interrupted or a node fails.

    Args:
        agents: connected, one for each node.
        key: the cluster's, for the coordinator's own ends.
        config: how thoroughly.
        on_progress: (what, done, total).
        is_interrupted: asked between rounds.
    """

    def __init__(
        self,
        agents: Agents,
        key: ClusterKey,
        config: NetConfig,
        *,
        on_progress: Callable[[str, float, float], None],
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._agents = agents
        self._key = key
        self._config = config
        self._on_progress = on_progress
        self._is_interrupted = is_interrupted
        self._names = (COORDINATOR, *agents.addresses)
        self._measured: dict[Pair, list[LinkMeasured]] = {}  # pair -> its measurements, in order
        self._cards: list[Card] = []

    def run(self) -> NetworkMeasured:
        """Measure; what was measured by then is the answer where something breaks or an interrupt comes."""
        begin = time.perf_counter()
        cut_short = ""
        try:
            self._measure_links()
            if self._config.measures_cards:
                self._measure_cards()
        except _InterruptedError as error:
            cut_short = str(error)
        except HelixbenchError as error:
            cut_short = f"ended by an error: {error}"
        return NetworkMeasured(
            links=self._links(), cards=tuple(self._cards), seconds=time.perf_counter() - begin, cut_short=cut_short
        )

    def _measure_links(self) -> None:
        schedule = rounds(self._names)
        if self._config.one_pair_at_a_time:
            schedule = [[pair] for pairs in schedule for pair in pairs]
        for number, pairs in enumerate(schedule):
            self._stop_if_interrupted(f"{number} of {len(schedule)} rounds")
            self._measure_round(pairs)
            self._on_progress("links", number + 1, len(schedule))
        self._measure_doubtful_again()

    def _measure_doubtful_again(self) -> None:
        left = self._config.max_retry_rounds
        while left > 0:
            again = [pair for pair in self._doubts() if len(self._measured[pair]) < self._config.max_attempts]
            schedule = [[pair] for pair in again] if self._config.one_pair_at_a_time else pack(again)
            if not schedule:
                return
            for number, pairs in enumerate(schedule[:left]):
                self._stop_if_interrupted("all links, before doubtful ones were measured again")
                self._measure_round(pairs)
                self._on_progress("doubtful links again", number + 1, min(left, len(schedule)))
            left -= len(schedule)

    def _measure_round(self, pairs: Sequence[Pair]) -> None:
        """iperf3 servers at the far ends, then all pairs at once; the coordinator measures its own."""
        ports = self._serve({_far_end(pair): 1 for pair in pairs})
        commands = {pair: self._link_command(pair, ports) for pair in pairs}
        own = {pair: command for pair, command in commands.items() if COORDINATOR in pair}
        asked = {pair[0]: (pair, command) for pair, command in commands.items() if COORDINATOR not in pair}
        worker = _Background(lambda: self._measure_own(own))
        answers = self._agents.ask(
            {node: command for node, (_, command) in asked.items()}, LinkMeasured, timeout_s=ANSWER_TIMEOUT_S
        )
        results = {asked[node][0]: answer for node, answer in answers.items()} | worker.join()
        for pair in pairs:
            self._measured.setdefault(pair, []).append(results[pair])

    def _link_command(self, pair: Pair, ports: Mapping[str, Sequence[int]]) -> MeasureLink:
        far = _far_end(pair)
        before = self._measured.get(pair, [])
        return MeasureLink(
            address=self._agents.addresses[far],
            iperf_port=next(iter(ports[far]), None),
            seconds=self._config.seconds,
            reverse=far == pair[0],
            message_bytes=() if any(one.message_times for one in before) else self._config.message_bytes,
            message_limit_s=self._config.message_limit_s,
            rough_bytes_per_s=bandwidth_of([_attempt(one) for one in before]),
        )

    def _measure_own(self, commands: Mapping[Pair, MeasureLink]) -> dict[Pair, LinkMeasured]:
        transport = Transport(self._key)
        try:
            return {pair: measure_link(transport, command) for pair, command in commands.items()}
        finally:
            transport.close()

    def _measure_cards(self) -> None:
        """Each node in turn: all that it sends at once, and all that it receives."""
        alone = {
            pair: rate
            for pair, tried in self._measured.items()
            if (rate := bandwidth_of([_attempt(one) for one in tried])) is not None
        }
        turns: list[tuple[Direction, ...]] = [("out", "in")] if self._config.both_at_once else [("out",), ("in",)]
        for number, name in enumerate(self._names):
            for directions in turns:
                self._stop_if_interrupted(f"all links, and the cards of {number} of {len(self._names)} nodes")
                at_once, problem = self._measure_at_once(name, directions, alone)
                made = [make_card(name, direction, alone, at_once, problem=problem) for direction in directions]
                self._cards += [card for card in made if card is not None]
            self._on_progress("network cards", number + 1, len(self._names))

    def _measure_at_once(
        self, center: str, directions: Sequence[Direction], alone: Mapping[Pair, float]
    ) -> tuple[dict[Pair, float], str]:
        """Bytes/s of the node's pairs while all of them are busy; none, and why, where that cannot be measured."""
        pairs = [pair for d in directions for pair in alone if pair[0 if d == "out" else 1] == center]
        if len(pairs) < 2 * len(directions):
            return {}, "it has one link"
        if any(one.source == TRANSPORT_SOURCE for pair in pairs for one in self._measured[pair]):
            return {}, "iperf3 is missing"
        servers = {pair: _server_end(pair, center) for pair in pairs}
        counts: dict[str, int] = {}
        for name in servers.values():
            counts[name] = counts.get(name, 0) + 1
        ports = {name: list(free) for name, free in self._serve(counts).items()}
        if not all(ports.values()):
            return {}, "iperf3 is missing"
        flows = {
            pair: self._flow(pair, server, ports[server].pop(), rough_bytes_per_s=alone[pair] / len(pairs))
            for pair, server in servers.items()
        }
        own = [pair for pair in pairs if _client_end(pair, center) == COORDINATOR]
        asked = [pair for pair in pairs if pair not in own]
        worker = _Background(lambda: measure_flows(self._flows_command([flows[pair] for pair in own])))
        request = {center: self._flows_command([flows[pair] for pair in asked])} if asked else {}
        answers = self._agents.ask(request, FlowsMeasured, timeout_s=ANSWER_TIMEOUT_S)
        rates: dict[Pair, float] = {}
        for group, answer in ((own, worker.join()), (asked, answers.get(center, FlowsMeasured(())))):
            if answer.error:
                return {}, answer.error
            rates |= dict(zip(group, answer.bytes_per_s, strict=True))
        return rates, ""

    def _flow(self, pair: Pair, server: str, port: int, *, rough_bytes_per_s: float) -> Flow:
        host = self._agents.addresses[server].rpartition(":")[0]
        return Flow(host, port, reverse=server == pair[0], rough_bytes_per_s=rough_bytes_per_s)

    def _flows_command(self, flows: Sequence[Flow]) -> MeasureFlows:
        return MeasureFlows(tuple(flows), self._config.card_seconds)

    def _serve(self, counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Start iperf3 servers: node -> their ports, none where it has no iperf3."""
        serving = self._agents.ask(
            {node: IperfServe(count) for node, count in counts.items()}, IperfServing, timeout_s=_SERVE_TIMEOUT_S
        )
        return {node: answer.ports for node, answer in serving.items()}

    def _doubts(self) -> dict[Pair, Doubt]:
        return find_doubts(self._attempts())

    def _attempts(self) -> dict[Pair, list[Attempt]]:
        return {pair: [_attempt(one) for one in tried] for pair, tried in self._measured.items()}

    def _links(self) -> tuple[MeasuredLink, ...]:
        attempts, doubts = self._attempts(), self._doubts()
        order = {name: index for index, name in enumerate(self._names)}
        pairs = sorted(self._measured, key=lambda pair: (order[pair[0]], order[pair[1]]))
        return tuple(_merge(pair, self._measured[pair], attempts, doubts.get(pair)) for pair in pairs)

    def _stop_if_interrupted(self, done: str) -> None:
        if self._is_interrupted():
            raise _InterruptedError(f"interrupted after {done}")


class _InterruptedError(Exception):
    """The user has had enough."""


def _merge(
    pair: Pair, tried: Sequence[LinkMeasured], attempts: Mapping[Pair, Sequence[Attempt]], doubt: Doubt | None
) -> MeasuredLink:
    latencies = [one.latency_s for one in tried if one.latency_s is not None]
    return MeasuredLink(
        src=pair[0],
        dst=pair[1],
        bandwidth_bytes_per_s=bandwidth_of(attempts[pair]),
        latency_s=statistics.median(latencies) if latencies else None,
        source=next((one.source for one in reversed(tried) if one.source), ""),
        spread=tried[-1].spread,
        retransmitted=tried[-1].retransmitted,
        attempts_bytes_per_s=tuple(one.bandwidth_bytes_per_s for one in tried if one.bandwidth_bytes_per_s is not None),
        message_times=next((one.message_times for one in tried if one.message_times), ()),
        suspect=doubt.reason if doubt is not None else "",
        note=confirmed_oddity(pair, attempts) if doubt is None else "",
    )


def _attempt(measured: LinkMeasured) -> Attempt:
    return Attempt(
        bytes_per_s=measured.bandwidth_bytes_per_s,
        spread=measured.spread,
        retransmitted=measured.retransmitted,
        error=measured.error,
    )


def _far_end(pair: Pair) -> str:
    """The end that serves iperf3: the one that is not the coordinator, which has no agent to be asked."""
    return pair[0] if pair[1] == COORDINATOR else pair[1]


def _client_end(pair: Pair, center: str) -> str:
    """Where all of a node's pairs are measured at once: at the node, but the coordinator is a client always."""
    return COORDINATOR if COORDINATOR in pair else center


def _server_end(pair: Pair, center: str) -> str:
    client = _client_end(pair, center)
    return pair[0] if pair[1] == client else pair[1]


class _Background(Generic[ResultT]):
    """A function in a thread of its own; ``join`` gives what it returned, or raises what it raised."""

    def __init__(self, function: Callable[[], ResultT]) -> None:
        self._function = function
        self._results: list[ResultT] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._function())
        except Exception as error:
            self._error = error

    def join(self) -> ResultT:
        self._thread.join(ANSWER_TIMEOUT_S)
        if self._thread.is_alive():
            raise MeasurementError(f"the coordinator's own links were not measured within {ANSWER_TIMEOUT_S:.0f} s")
        if self._error is not None:
            raise self._error
        return self._results[0]
