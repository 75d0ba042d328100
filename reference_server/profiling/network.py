"""Measure a cluster's links and network cards: rounds of pairs, doubtful ones again, then each node's links at once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import msgspec

from helixbench.errors import HelixbenchError, MeasurementError
from helixbench.profiler.cluster import COORDINATOR
from helixbench.profiler.network.nics import Card, Direction, make_card
from helixbench.profiler.network.records import MeasuredLink
from helixbench.profiler.network.schedule import Pair, pack, rounds
from helixbench.profiler.network.suspects import Attempt, Doubt, bandwidth_of, find_doubts
from helixbench.reference_server.profiling.links import TRANSPORT_SOURCE, measure_flows, measure_link
from helixbench.reference_server.profiling.net_config import NetConfig
from helixbench.reference_server.profiling.net_pairs import (
    attempt_of,
    card_turns,
    client_end,
    far_end,
    merge,
    server_end,
)
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.keys import ClusterKey
from helixbench.reference_server.wire.link_messages import (
    Flow,
    FlowsMeasured,
    IperfServe,
    IperfServing,
    LinkMeasured,
    MeasureFlows,
    MeasureLink,
)
from helixbench.reference_server.wire.transport import Transport

ANSWER_TIMEOUT_S = 60.0  # for all that is not the time of bandwidth that was asked for
_SERVE_TIMEOUT_S = 60.0
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
        cards = sorted(self._cards, key=lambda card: (self._names.index(card.node), card.direction == "in"))
        return NetworkMeasured(
            links=self._links(), cards=tuple(cards), seconds=time.perf_counter() - begin, cut_short=cut_short
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
        serving = self._serve({far_end(pair): 1 for pair in pairs})
        commands = {pair: self._link_command(pair, serving[far_end(pair)]) for pair in pairs}
        own = {pair: command for pair, command in commands.items() if COORDINATOR in pair}
        asked = {pair[0]: (pair, command) for pair, command in commands.items() if COORDINATOR not in pair}
        timeout_s = self._config.seconds + ANSWER_TIMEOUT_S
        worker = _Background(lambda: self._measure_own(own))
        answers = self._agents.ask(
            {node: command for node, (_, command) in asked.items()}, LinkMeasured, timeout_s=timeout_s
        )
        results = {asked[node][0]: answer for node, answer in answers.items()} | worker.join(timeout_s)
        for pair in pairs:
            self._measured.setdefault(pair, []).append(results[pair])

    def _link_command(self, pair: Pair, serving: IperfServing) -> MeasureLink:
        far = far_end(pair)
        before = self._measured.get(pair, [])
        return MeasureLink(
            address=self._agents.addresses[far],
            iperf_port=next(iter(serving.ports), None),
            iperf_problem=f"{far}: {serving.error}" if serving.error else "",
            seconds=self._config.seconds,
            reverse=far == pair[0],
            message_bytes=() if any(one.message_times for one in before) else self._config.message_bytes,
            message_limit_s=self._config.message_limit_s,
            rough_bytes_per_s=bandwidth_of([attempt_of(one) for one in before]),
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
            if (rate := bandwidth_of([attempt_of(one) for one in tried])) is not None
        }
        turns = card_turns(self._names, two_at_once=self._config.two_cards_at_once)
        for number, ends in enumerate(turns):
            self._stop_if_interrupted(f"all links, and {number} of {len(turns)} turns at network cards")
            at_once, problem = self._measure_at_once(ends, alone)
            made = [make_card(name, direction, alone, at_once, problem=problem) for name, direction in ends]
            self._cards += [card for card in made if card is not None]
            self._on_progress("network cards", number + 1, len(turns))

    def _measure_at_once(
        self, ends: Sequence[tuple[str, Direction]], alone: Mapping[Pair, float]
    ) -> tuple[dict[Pair, float], str]:
        """Bytes/s of all pairs at these ends while all are busy; none, and why, where that cannot be measured."""
        pairs = [pair for pair in alone if (pair[0], "out") in ends or (pair[1], "in") in ends]
        if len(self._names) < 3:
            return {}, "it has one link"
        if any(one.source == TRANSPORT_SOURCE for pair in pairs for one in self._measured[pair]):
            return {}, "iperf3 is missing"
        counts = Counter(server_end(pair) for pair in pairs)
        serving = self._serve(counts)
        problem = "; ".join(f"{name}: {answer.error}" for name, answer in serving.items() if answer.error)
        if problem:
            return {}, problem
        ports = {name: list(answer.ports) for name, answer in serving.items()}
        if not all(ports.values()):
            return {}, "iperf3 is missing"
        flows: dict[str, dict[Pair, Flow]] = {}  # client -> its flows
        for pair in pairs:
            rough_bytes_per_s = alone[pair] / (len(self._names) - 1)
            port = ports[server_end(pair)].pop()
            flows.setdefault(client_end(pair), {})[pair] = self._flow(pair, port, rough_bytes_per_s)
        own = flows.pop(COORDINATOR, {})
        timeout_s = self._config.card_seconds + ANSWER_TIMEOUT_S
        worker = _Background(lambda: measure_flows(self._flows_command(own)))
        answers = self._agents.ask(
            {client: self._flows_command(asked) for client, asked in flows.items()},
            FlowsMeasured,
            timeout_s=timeout_s,
        )
        answers[COORDINATOR] = worker.join(timeout_s)
        rates: dict[Pair, float] = {}
        for client, answer in answers.items():
            if answer.error:
                return {}, answer.error
            rates |= dict(zip(own if client == COORDINATOR else flows[client], answer.bytes_per_s, strict=True))
        return rates, ""

    def _flow(self, pair: Pair, port: int, rough_bytes_per_s: float) -> Flow:
        server = server_end(pair)
        host = self._agents.addresses[server].rpartition(":")[0]
        return Flow(host, port, reverse=server == pair[0], rough_bytes_per_s=rough_bytes_per_s)

    def _flows_command(self, flows: Mapping[Pair, Flow]) -> MeasureFlows:
        return MeasureFlows(tuple(flows.values()), self._config.card_seconds)

    def _serve(self, counts: Mapping[str, int]) -> dict[str, IperfServing]:
        """Start iperf3 servers, so many on each node."""
        return self._agents.ask(
            {node: IperfServe(count) for node, count in counts.items()}, IperfServing, timeout_s=_SERVE_TIMEOUT_S
        )

    def _doubts(self) -> dict[Pair, Doubt]:
        return find_doubts(self._attempts())

    def _attempts(self) -> dict[Pair, list[Attempt]]:
        return {pair: [attempt_of(one) for one in tried] for pair, tried in self._measured.items()}

    def _links(self) -> tuple[MeasuredLink, ...]:
        attempts, doubts = self._attempts(), self._doubts()
        order = {name: index for index, name in enumerate(self._names)}
        pairs = sorted(self._measured, key=lambda pair: (order[pair[0]], order[pair[1]]))
        return tuple(merge(pair, self._measured[pair], attempts, doubts.get(pair)) for pair in pairs)

    def _stop_if_interrupted(self, done: str) -> None:
        if self._is_interrupted():
            raise _InterruptedError(f"interrupted after {done}")


class _InterruptedError(Exception):
    """The user has had enough."""


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

    def join(self, timeout_s: float) -> ResultT:
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise MeasurementError(f"the coordinator's own links were not measured within {timeout_s:.0f} s")
        if self._error is not None:
            raise self._error
        return self._results[0]
