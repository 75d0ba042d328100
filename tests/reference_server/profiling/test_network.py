"""The order in which a network is measured, what is measured again, and what is kept: real agents, made-up links."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from helixbench.errors import InputError, MeasurementError
from helixbench.profiler.cluster import COORDINATOR, MessageTime
from helixbench.profiler.network.nics import make_card
from helixbench.profiler.network.records import MeasuredLink, NetworkProfile
from helixbench.profiler.network.schedule import Pair
from helixbench.records import load_record
from helixbench.reference_server.profiling import links as link_probe
from helixbench.reference_server.profiling import net_cli
from helixbench.reference_server.profiling import network as profile_net
from helixbench.reference_server.profiling.net_config import NetConfig
from helixbench.reference_server.profiling.net_pairs import card_turns, client_end, server_end
from helixbench.reference_server.profiling.net_show import COLUMNS_AT_ONCE, show_network
from helixbench.reference_server.profiling.network import NetworkMeasured, NetworkMeasurement
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.keys import load_key_file, make_key_file
from helixbench.reference_server.wire.link_messages import FlowsMeasured, LinkMeasured, MeasureFlows, MeasureLink
from tests.reference_server.running import RunningAgents
from tests.reference_server.threads import agents_in_threads

CONFIG = NetConfig(message_bytes=(64,))
ALIKE = 100.0  # bytes/s


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
    """Links of the coordinator whose measurements are given, in order; all others are alike. Flows share a card."""

    def __init__(self, card: float) -> None:
        self.card = card
        self.given: dict[tuple[str, bool], list[LinkMeasured]] = {}  # (agent's address, from it) -> what comes out
        self.asked: list[tuple[str, bool]] = []
        self.flows: list[MeasureFlows] = []

    def own(self, _: object, command: MeasureLink) -> LinkMeasured:
        if command.iperf_problem:
            return failed(command.iperf_problem)
        self.asked.append((command.address, command.reverse))
        given = self.given.get((command.address, command.reverse), [])
        return given.pop(0) if given else self.other(_, command)

    def other(self, _: object, command: MeasureLink) -> LinkMeasured:
        times = tuple(MessageTime(size, 0.7) for size in command.message_bytes)
        return LinkMeasured(bandwidth_bytes_per_s=ALIKE, latency_s=0.5, source="made up", message_times=times)

    def at_once(self, command: MeasureFlows) -> FlowsMeasured:
        self.flows.append(command)
        return FlowsMeasured(tuple(self.card for _ in command.flows))


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> MadeUpLinks:
    made = MadeUpLinks(card=30.0)
    monkeypatch.setattr(link_probe, "Iperf3Server", Servers)
    monkeypatch.setattr(Servers, "fail", 0)
    monkeypatch.setattr(link_probe, "measure_link", made.other)
    monkeypatch.setattr(link_probe, "measure_flows", made.at_once)
    monkeypatch.setattr(profile_net, "measure_link", made.own)
    monkeypatch.setattr(profile_net, "measure_flows", made.at_once)
    return made


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    make_key_file(tmp_path / "cluster.key")
    return tmp_path / "cluster.key"


@pytest.fixture
def addresses(key_file: Path, links: MadeUpLinks) -> Iterator[dict[str, str]]:
    with agents_in_threads(["a", "b"], key_file) as made:
        yield made


def test_turns_of_two_cards_hold_each_direction_once_and_never_both_of_one_card() -> None:
    names = ["a", "b", "c", "d"]
    turns = card_turns(names, two_at_once=True)
    assert sorted(end for ends in turns for end in ends) == sorted(itertools.product(names, ["in", "out"]))
    assert all(len({name for name, _ in ends}) == 2 for ends in turns)
    assert card_turns(["a"], two_at_once=False) == [[("a", "out")], [("a", "in")]]


def test_the_receiver_is_the_client_but_for_the_coordinator() -> None:
    assert (client_end(("a", "b")), server_end(("a", "b"))) == ("b", "a")
    assert (client_end((COORDINATOR, "b")), server_end((COORDINATOR, "b"))) == (COORDINATOR, "b")
    assert (client_end(("a", COORDINATOR)), server_end(("a", COORDINATOR))) == (COORDINATOR, "a")


def run(addresses: dict[str, str], key_file: Path, config: NetConfig = CONFIG, **more: Any) -> NetworkMeasured:
    key = load_key_file(key_file)
    with Agents(addresses, key) as agents:
        return NetworkMeasurement(agents, key, config, on_progress=lambda *_: None, **more).run()


def by_pair(measured: NetworkMeasured) -> dict[Pair, MeasuredLink]:
    return {(link.src, link.dst): link for link in measured.links}


def failed(reason: str) -> LinkMeasured:
    return LinkMeasured(bandwidth_bytes_per_s=None, latency_s=0.4, error=reason)


def rate(bytes_per_s: float, **more: Any) -> LinkMeasured:
    return LinkMeasured(bandwidth_bytes_per_s=bytes_per_s, latency_s=0.5, source="made up", **more)


def test_all_pairs_and_all_cards_are_measured(addresses: dict[str, str], key_file: Path, links: MadeUpLinks) -> None:
    measured = run(addresses, key_file)

    assert list(by_pair(measured)) == list(itertools.permutations([COORDINATOR, "a", "b"], 2))
    assert {len(link.attempts_bytes_per_s) for link in measured.links} == {1}
    assert {link.suspect + link.note for link in measured.links} == {""}
    assert {link.message_times for link in measured.links} == {(MessageTime(64, 0.7),)}
    assert [(card.node, card.direction) for card in measured.cards] == list(
        itertools.product([COORDINATOR, "a", "b"], ["out", "in"])
    )
    assert {card.at_once_bytes_per_s for card in measured.cards} == {60.0}
    assert {card.limit_bytes_per_s() for card in measured.cards} == {100.0}, "not below its best link"
    flows = [flow for command in links.flows for flow in command.flows]
    assert len(flows) == 3 * 2 * 2
    assert {flow.rough_bytes_per_s for flow in flows} == {50.0}
    assert measured.cut_short == ""


def test_two_cards_at_once_take_half_as_many_turns(
    addresses: dict[str, str], key_file: Path, links: MadeUpLinks
) -> None:
    measured = run(addresses, key_file, NetConfig(two_cards_at_once=True))

    ends = list(itertools.product([COORDINATOR, "a", "b"], ["out", "in"]))
    assert [(card.node, card.direction) for card in measured.cards] == ends
    assert {(card.num_links, card.at_once_bytes_per_s) for card in measured.cards} == {(2, 60.0)}
    assert sum(len(command.flows) for command in links.flows) == 3 * 3, "the pair between the two is of both"
    ports = [[(flow.host, flow.port) for flow in command.flows] for command in links.flows]
    assert all(len(set(used)) == len(used) for used in ports), "each flow has a server of its own"


def test_a_bad_measurement_is_repeated_until_a_good_one_comes(
    addresses: dict[str, str], key_file: Path, links: MadeUpLinks
) -> None:
    links.given[addresses["a"], False] = [failed("reset by peer"), rate(98.0, spread=0.01)]
    measured = run(addresses, key_file)

    link = by_pair(measured)[COORDINATOR, "a"]
    assert (link.attempts_bytes_per_s, link.suspect) == ((98.0,), "")
    assert links.asked.count((addresses["a"], False)) == 2
    assert len(links.asked) == 5


def test_what_stays_bad_is_marked_with_its_reason(
    addresses: dict[str, str], key_file: Path, links: MadeUpLinks
) -> None:
    links.given[addresses["a"], False] = [failed("reset by peer")] * 9
    links.given[addresses["b"], True] = [rate(100.0, spread=0.5), rate(60.0, spread=0.5), rate(80.0, spread=0.5)]
    measured = run(addresses, key_file)

    lost, noisy = by_pair(measured)[COORDINATOR, "a"], by_pair(measured)["b", COORDINATOR]
    assert (lost.bandwidth_bytes_per_s, lost.latency_s, lost.suspect) == (None, 0.4, "reset by peer")
    assert links.asked.count((addresses["a"], False)) == CONFIG.max_attempts
    assert (noisy.bandwidth_bytes_per_s, noisy.attempts_bytes_per_s) == (80.0, (100.0, 60.0, 80.0))
    assert noisy.suspect == "rates of its intervals spread by 50%"
    assert [card.num_links for card in measured.cards if card.node == "a"] == [2, 1]


def test_a_slow_direction_is_confirmed_by_a_second_measurement(
    addresses: dict[str, str], key_file: Path, links: MadeUpLinks
) -> None:
    links.given[addresses["a"], True] = [rate(40.0), rate(41.0)]
    link = by_pair(run(addresses, key_file))["a", COORDINATOR]

    assert link.bandwidth_bytes_per_s == 40.5
    assert (link.suspect, link.note) == ("", "40% of the reverse direction; a second measurement agrees")


def test_rounds_of_doubtful_pairs_are_bounded(addresses: dict[str, str], key_file: Path, links: MadeUpLinks) -> None:
    links.given[addresses["a"], False] = [failed("reset by peer")] * 9
    run(addresses, key_file, NetConfig(message_bytes=(), max_attempts=9, max_retry_rounds=2))
    assert links.asked.count((addresses["a"], False)) == 3


def test_an_interrupt_keeps_what_was_measured(addresses: dict[str, str], key_file: Path) -> None:
    answers = iter([False, False, True])
    measured = run(addresses, key_file, is_interrupted=lambda: next(answers))

    assert len(measured.links) == 2
    assert measured.cards == ()
    assert measured.cut_short == "interrupted after 2 of 6 rounds"


def test_an_agent_that_fails_ends_it_and_keeps_what_was_measured(
    addresses: dict[str, str], key_file: Path, links: MadeUpLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise MeasurementError("the wire is cut")

    measured_before = iter(range(2))

    def own(transport: object, command: MeasureLink) -> LinkMeasured:
        if next(measured_before, None) is None:
            fail(None)
        return links.own(transport, command)

    monkeypatch.setattr(profile_net, "measure_link", own)
    measured = run(addresses, key_file)

    assert measured.cut_short == "ended by an error: the wire is cut"
    assert 2 <= len(measured.links) < 6


@pytest.mark.parametrize(("fail", "reason"), [(1, ""), (2, ""), (99, r"[ab]: port \d+ is taken")])
def test_a_server_that_fails_is_tried_on_other_ports_and_then_is_the_pairs_failure(
    addresses: dict[str, str], key_file: Path, monkeypatch: pytest.MonkeyPatch, fail: int, reason: str
) -> None:
    monkeypatch.setattr(Servers, "fail", fail)
    measured = run(addresses, key_file, NetConfig(message_bytes=(), max_attempts=1, one_pair_at_a_time=True))

    assert measured.cut_short == ""
    assert len(measured.links) == 6
    own = [link for link in measured.links if COORDINATOR in (link.src, link.dst)]
    assert all(re.fullmatch(reason, link.suspect) for link in own)
    assert {link.bandwidth_bytes_per_s for link in own} == ({None} if reason else {ALIKE})


@pytest.mark.parametrize("seconds", [2.0, 300.0])
def test_as_long_as_was_asked_for_is_waited_on_top_of_all_else(
    addresses: dict[str, str], key_file: Path, links: MadeUpLinks, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    asked: dict[str, float] = {}
    ask = Agents.ask

    def noted(self: Agents, commands: Any, expected: type, *, timeout_s: float, **more: Any) -> Any:
        asked[expected.__name__] = timeout_s
        return ask(self, commands, expected, timeout_s=timeout_s, **more)

    joined: list[float] = []
    join = profile_net._Background.join
    monkeypatch.setattr(Agents, "ask", noted)

    def noted_join(self: Any, timeout_s: float) -> Any:
        joined.append(timeout_s)
        return join(self, timeout_s)

    monkeypatch.setattr(profile_net._Background, "join", noted_join)
    run(addresses, key_file, NetConfig(seconds=seconds, card_seconds=3 * seconds, message_bytes=()))

    assert (asked["LinkMeasured"], asked["FlowsMeasured"]) == (seconds + 60, 3 * seconds + 60)
    assert set(joined) == {seconds + 60, 3 * seconds + 60}


def test_one_pair_at_a_time_measures_the_same(addresses: dict[str, str], key_file: Path, links: MadeUpLinks) -> None:
    measured = run(addresses, key_file, NetConfig(one_pair_at_a_time=True, measures_cards=False))
    assert len(measured.links) == 6
    assert measured.cards == ()


# What is shown


def profile_of(names: tuple[str, ...], **changes: Any) -> NetworkProfile:
    measured = tuple(
        MeasuredLink(
            src=src,
            dst=dst,
            bandwidth_bytes_per_s=1.25e7 * (1 + index),
            latency_s=1e-3,
            source="made up",
            attempts_bytes_per_s=(1.25e7,),
            message_times=(MessageTime(1000, 0.01),),
        )
        for index, (src, dst) in enumerate(itertools.permutations(names, 2))
    )
    return NetworkProfile(**({"nodes": names, "links": measured} | changes))


def shown(profile: NetworkProfile) -> list[str]:
    page = io.StringIO()
    show_network(profile, Console(width=80, file=page))
    return page.getvalue().splitlines()


@pytest.mark.parametrize("num_nodes", [2, 8, 11])
def test_the_matrix_fits_80_columns_and_folds_beyond_eight_nodes(num_nodes: int) -> None:
    names = tuple(f"a-node-with-a-long-name-{index}" for index in range(num_nodes))
    lines = shown(profile_of(names))

    assert max(len(line) for line in lines) <= 80
    heads = [line.split() for line in lines if line.split() and all(word.isdecimal() for word in line.split())]
    columns = [str(index + 1) for index in range(num_nodes)]
    folded = [columns[first : first + COLUMNS_AT_ONCE] for first in range(0, num_nodes, COLUMNS_AT_ONCE)]
    assert heads == folded * 2, "once for bandwidth, once for latency"


def test_doubtful_links_shared_cards_and_the_models_misses_are_told() -> None:
    plain = profile_of(("a", "b"))
    lost = MeasuredLink(src="b", dst="a", bandwidth_bytes_per_s=None, latency_s=None, source="", suspect="no route")
    card = make_card("a", "out", {("a", "b"): 1e7, ("a", "c"): 1e7}, {("a", "b"): 6e6, ("a", "c"): 6e6})
    assert card is not None
    text = "\n".join(shown(profile_of(("a", "b"), links=(plain.links[0], lost), cards=(card,), cut_short="no time")))

    assert "CUT SHORT: no time" in text
    assert "? b -> a is doubtful: no route" in text
    assert "a    out    96.0   160 80.0 links share it" in text
    assert "a -> b: 1000 bytes in 10.00 ms, 9.26 of the model" in text


# The command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agent": ["a=h:1"]}, "give --key"),
        ({"agent": ["a=h:1"], "key": Path("k"), "testbed": Path("t")}, "no --testbed"),
        ({"key": Path("k")}, "belongs to --agent"),
        ({"agent": ["a=h:1"], "key": Path("/nowhere/k")}, "no such file"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        net_cli._spec(options.get("testbed"), options.get("agent", []), options.get("key"))


def test_agents_that_run_are_a_testbed_of_addresses(key_file: Path) -> None:
    spec = net_cli._spec(None, ["a=10.0.0.1:5", "b=10.0.0.2:5"], key_file)
    assert [(node.name, node.address) for node in spec.remote_nodes] == [("a", "10.0.0.1:5"), ("b", "10.0.0.2:5")]
    assert spec.key_file == key_file


def test_the_command_measures_agents_that_run(running: RunningAgents, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(net_cli.profile_net)
    node, address = next(iter(running.addresses.items()))
    options = ["--agent", f"{node}={address}", "--key", str(running.key_file), "--seconds", "1", "--no-cards"]
    result = CliRunner().invoke(app, [*options, "-o", str(tmp_path / "network.json")])

    assert result.exit_code == 0, result.output
    measured = load_record(tmp_path / "network.json", NetworkProfile)
    assert [(link.src, link.dst) for link in measured.links] == [(COORDINATOR, node), (node, COORDINATOR)]
    assert all(link.bandwidth_bytes_per_s for link in measured.links)
    assert "2 links of 2 nodes" in result.stdout
    assert "at an address" in result.stdout
