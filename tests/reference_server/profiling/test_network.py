"""The order in which a network is measured, and what is measured again: real agents, made-up links."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helixbench.errors import MeasurementError
from helixbench.profiler.cluster import COORDINATOR, Link, MessageTime
from helixbench.profiler.network.schedule import Pair
from helixbench.reference_server.launch import agent as launched
from helixbench.reference_server.profiling import links as link_probe
from helixbench.reference_server.profiling import network as module
from helixbench.reference_server.profiling.config import NetworkConfig
from helixbench.reference_server.profiling.network import NetworkMeasured, measure_network
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.keys import load_key_file, make_key_file
from helixbench.reference_server.wire.messages import FlowsMeasured, LinkMeasured, MeasureFlows, MeasureLink
from tests.reference_server.threads import agents_in_threads

CONFIG = NetworkConfig(message_bytes=(64,))
ALIKE = 1.25e7  # bytes/s: 100 Mbit/s
IPERF3 = "iperf3 3.18"


class Servers:
    """Stands for iperf3's; the next ones fail where a test says how many."""

    fail = 0

    def __init__(self, port: int) -> None:
        self.port = port
        if Servers.fail:
            Servers.fail -= 1
            raise MeasurementError(f"port {port} is taken")

    def close(self) -> None: ...


class MadeUpLinks:
    """Links of the coordinator whose measurements are given, in order; all others are alike. Flows share a NIC."""

    def __init__(self, nic: float) -> None:
        self.nic = nic
        self.given: dict[tuple[str, bool], list[LinkMeasured]] = {}  # (agent's address, from it) -> what comes out
        self.asked: list[tuple[str, bool]] = []
        self.flows: list[MeasureFlows] = []

    def own(self, _: object, command: MeasureLink) -> LinkMeasured:
        self.asked.append((command.address, command.reverse))
        given = self.given.get((command.address, command.reverse), [])
        return given.pop(0) if given else self.other(_, command)

    def other(self, _: object, command: MeasureLink) -> LinkMeasured:
        times = tuple(MessageTime(size, 0.7) for size in command.message_bytes)
        iperf3 = "" if command.iperf_port is None else IPERF3
        return LinkMeasured(ALIKE, 0.5, iperf3=iperf3, message_times=times)

    def at_once(self, command: MeasureFlows) -> FlowsMeasured:
        self.flows.append(command)
        return FlowsMeasured(tuple(self.nic for _ in command.flows))


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> MadeUpLinks:
    made = MadeUpLinks(nic=ALIKE / 4)
    monkeypatch.setattr(link_probe, "Iperf3Server", Servers)
    monkeypatch.setattr(Servers, "fail", 0)
    monkeypatch.setattr(launched, "measure_link", made.other)
    monkeypatch.setattr(launched, "measure_flows", made.at_once)
    monkeypatch.setattr(module, "measure_link", made.own)
    monkeypatch.setattr(module, "measure_flows", made.at_once)
    return made


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    make_key_file(tmp_path / "cluster.key")
    return tmp_path / "cluster.key"


@pytest.fixture
def addresses(key_file: Path, links: MadeUpLinks) -> Iterator[dict[str, str]]:
    with agents_in_threads(["a", "b"], key_file) as made:
        yield made


def run(
    addresses: dict[str, str], key_file: Path, config: NetworkConfig = CONFIG, steps: list[str] | None = None
) -> NetworkMeasured:
    key = load_key_file(key_file)
    with Agents(addresses, key) as agents:
        return measure_network(
            agents, key, config, on_progress=lambda what, *_: None if steps is None else steps.append(what)
        )


def by_pair(measured: NetworkMeasured) -> dict[Pair, Link]:
    return {(link.src, link.dst): link for link in measured.links}


def failed(reason: str) -> LinkMeasured:
    return LinkMeasured(None, 0.4, error=reason)


def rate(share: float) -> LinkMeasured:
    return LinkMeasured(share * ALIKE, 0.5, iperf3=IPERF3)


def test_all_pairs_are_measured_twice_and_all_nics(
    addresses: dict[str, str], key_file: Path, links: MadeUpLinks
) -> None:
    steps: list[str] = []
    measured = run(addresses, key_file, steps=steps)

    assert list(by_pair(measured)) == list(itertools.permutations([COORDINATOR, "a", "b"], 2))
    assert {(link.bandwidth_bytes_per_s, link.latency_s, link.source) for link in measured.links} == {
        (ALIKE, 0.5, IPERF3)
    }
    assert {link.message_times for link in measured.links} == {(MessageTime(64, 0.7),)}
    assert sorted(links.asked) == sorted(2 * list(itertools.product(addresses.values(), [False, True])))
    assert steps == ["links"] * 6 + ["links again"] * 6 + ["NICs"] * 3
    ends = list(itertools.product([COORDINATOR, "a", "b"], ["out", "in"]))
    assert [(nic.node, nic.direction) for nic in measured.nics] == ends
    assert {(nic.num_links, nic.at_once_bytes_per_s) for nic in measured.nics} == {(2, ALIKE / 2)}
    assert {nic.limit_bytes_per_s() for nic in measured.nics} == {ALIKE}, "not below its best link"


def test_each_turn_at_nics_keeps_all_links_of_one_sender_and_one_receiver_busy(
    addresses: dict[str, str], key_file: Path, links: MadeUpLinks
) -> None:
    run(addresses, key_file)

    flows = [flow for command in links.flows for flow in command.flows]
    assert len(flows) == 3 * 3, "two links out, two in, one of them both"
    assert {flow.rough_bytes_per_s for flow in flows} == {ALIKE / 2}
    ports = [[(flow.host, flow.port) for flow in command.flows] for command in links.flows]
    assert all(len(set(used)) == len(used) for used in ports), "each flow has a server of its own"


def test_a_pair_is_measured_until_two_attempts_agree(
    addresses: dict[str, str], key_file: Path, links: MadeUpLinks
) -> None:
    links.given[addresses["a"], False] = [failed("reset by peer"), rate(0.4), rate(0.98)]
    measured = run(addresses, key_file)

    assert by_pair(measured)[COORDINATOR, "a"].bandwidth_bytes_per_s == pytest.approx(0.99 * ALIKE)
    assert links.asked.count((addresses["a"], False)) == CONFIG.max_attempts == 4
    assert links.asked.count((addresses["b"], False)) == 2


def test_where_attempts_never_agree_the_transport_measures_and_the_record_says_so(
    addresses: dict[str, str], key_file: Path, links: MadeUpLinks
) -> None:
    links.given[addresses["a"], True] = [rate(0.2), rate(0.4), failed("reset by peer"), rate(0.8)]
    measured = run(addresses, key_file)

    link = by_pair(measured)["a", COORDINATOR]
    assert link.bandwidth_bytes_per_s == ALIKE
    assert link.source == (
        "helixbench transport (iperf3 attempts differ: 20, 40, 80 Mbit/s; 1 of 4 attempts failed: reset by peer)"
    )
    problems = {nic.problem for nic in measured.nics if nic.node == "a" and nic.direction == "out"}
    assert problems == {"iperf3 did not measure all of its links"}


def test_without_iperf3_the_transport_measures_once(
    addresses: dict[str, str], key_file: Path, links: MadeUpLinks, no_iperf3: None
) -> None:
    measured = run(addresses, key_file)

    assert {link.source for link in measured.links} == {"helixbench transport (iperf3 is missing)"}
    assert len(links.asked) == 4
    assert {nic.at_once_bytes_per_s for nic in measured.nics} == {None}


def test_a_link_that_nothing_measures_ends_the_measurement(
    addresses: dict[str, str], key_file: Path, links: MadeUpLinks
) -> None:
    links.given[addresses["a"], False] = [failed("no route")] * 9
    with pytest.raises(MeasurementError, match="link coordinator -> a could not be measured: no route"):
        run(addresses, key_file)


def test_an_agent_that_fails_ends_the_measurement(
    addresses: dict[str, str], key_file: Path, links: MadeUpLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object, __: object) -> LinkMeasured:
        raise MeasurementError("the wire is cut")

    monkeypatch.setattr(module, "measure_link", fail)
    with pytest.raises(MeasurementError, match="the wire is cut"):
        run(addresses, key_file)


@pytest.mark.parametrize(("fail", "reason"), [(1, ""), (2, ""), (99, r"[ab]: port \d+ is taken")])
def test_a_server_that_fails_is_tried_on_other_ports_and_then_is_the_pairs_failure(
    addresses: dict[str, str], key_file: Path, monkeypatch: pytest.MonkeyPatch, fail: int, reason: str
) -> None:
    monkeypatch.setattr(Servers, "fail", fail)
    measured = run(addresses, key_file, NetworkConfig(message_bytes=(), max_attempts=2, one_pair_at_a_time=True))

    sources = {link.source for link in measured.links}
    if reason:
        pattern = rf"helixbench transport \(iperf3 2 of 2 attempts failed: {reason}\)"
        assert all(re.fullmatch(pattern, source) for source in sources), sources
    else:
        assert sources == {IPERF3}


@pytest.mark.parametrize("seconds", [2.0, 300.0])
def test_as_long_as_was_asked_for_is_waited_on_top_of_all_else(
    addresses: dict[str, str], key_file: Path, links: MadeUpLinks, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    asked: dict[str, float] = {}
    ask = Agents.ask

    def noted(self: Agents, commands: Any, expected: type, *, timeout_s: float, **more: Any) -> Any:
        asked[expected.__name__] = timeout_s
        return ask(self, commands, expected, timeout_s=timeout_s, **more)

    monkeypatch.setattr(Agents, "ask", noted)
    run(addresses, key_file, NetworkConfig(seconds=seconds, nic_seconds=3 * seconds, message_bytes=()))

    assert (asked["LinkMeasured"], asked["FlowsMeasured"]) == (seconds + 60, 3 * seconds + 60)


def test_one_pair_at_a_time_measures_the_same(addresses: dict[str, str], key_file: Path, links: MadeUpLinks) -> None:
    steps: list[str] = []
    measured = run(addresses, key_file, NetworkConfig(message_bytes=(), one_pair_at_a_time=True), steps)
    assert len(measured.links) == 6
    assert steps.count("links") == steps.count("links again") == 6
