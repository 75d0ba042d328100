"""SimulatedLinks keep the order of messages between two nodes, and no channel carries more than its rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile, DefaultLink, Link
from helixbench.solver.simulation.event_loop import WIRE, EventLoop
from helixbench.solver.simulation.links import SimulatedLinks
from tests.solver.clusters import cost_node, model

NAMES = ("a", "b", "c")
LATENCY_S = 1e-3
SENDINGS = st.lists(
    st.tuples(st.floats(0, 0.05), st.sampled_from(NAMES), st.sampled_from(NAMES), st.integers(1, 100_000)).filter(
        lambda sending: sending[1] != sending[2]
    ),
    min_size=1,
    max_size=30,
)
RATES = st.sampled_from((1e6, 3e6, 1e7, None))


def links(
    cards: tuple[float | None, float | None], slow_link: float, *, transport_byte_s: float = 0.0
) -> tuple[EventLoop, SimulatedLinks]:
    profile = ClusterProfile(
        model=model(4),
        nodes=tuple(
            cost_node(name, speed=1.0, max_layers=4, nic_out_bytes_per_s=cards[0], nic_in_bytes_per_s=cards[1])
            for name in NAMES
        ),
        links=(
            Link(
                src="a",
                dst="b",
                bandwidth_bytes_per_s=slow_link,
                latency_s=LATENCY_S,
                transport_byte_s=transport_byte_s,
            ),
        ),
        default_link=DefaultLink(5e6, LATENCY_S),
    )
    loop = EventLoop()
    return loop, SimulatedLinks(profile, loop)


@given(sendings=SENDINGS, cards=st.tuples(RATES, RATES), slow_link=st.sampled_from((5e5, 2e6, 5e7)))
def test_messages_between_two_nodes_arrive_in_order_and_no_card_exceeds_its_rate(
    sendings: list[tuple[float, str, str, int]], cards: tuple[float | None, float | None], slow_link: float
) -> None:
    loop, net = links(cards, slow_link)
    arrived: list[tuple[float, int]] = []

    def send(index: int) -> None:
        _, src, dst, size = sendings[index]
        net.send(src, dst, size, lambda sent: arrived.append((loop.now_s, sent)), index)

    order = sorted(range(len(sendings)), key=lambda index: sendings[index][0])
    for index in order:
        loop.at(sendings[index][0], WIRE, send, index)
    while loop.run(1000):
        pass

    assert sorted(index for _, index in arrived) == list(range(len(sendings)))
    for src in NAMES:
        for dst in NAMES:
            way = [index for index in order if sendings[index][1:3] == (src, dst)]
            assert [index for _, index in arrived if index in way] == way
            rate = slow_link if (src, dst) == ("a", "b") else 5e6
            assert_carries_no_more_than(rate, [(at, i) for at, i in arrived if i in way], sendings)
    for name in NAMES:
        if cards[0] is not None:
            assert_carries_no_more_than(cards[0], [(at, i) for at, i in arrived if sendings[i][1] == name], sendings)
        if cards[1] is not None:
            assert_carries_no_more_than(cards[1], [(at, i) for at, i in arrived if sendings[i][2] == name], sendings)


def assert_carries_no_more_than(
    rate: float, arrived: list[tuple[float, int]], sendings: list[tuple[float, str, str, int]]
) -> None:
    """From the first sending on, by every arrival the channel has had the time for all that arrived."""
    if not arrived:
        return
    first_s = min(sendings[index][0] for _, index in arrived)
    carried = 0
    for at_s, index in sorted(arrived):
        carried += sendings[index][3]
        assert at_s >= first_s + LATENCY_S + carried / rate - 1e-9


def test_an_empty_network_adds_the_slowest_channel_and_the_latency() -> None:
    loop, net = links((1e7, 2e6), 5e5)
    arrived: list[float] = []
    net.send("a", "b", 1000, lambda _: arrived.append(loop.now_s), None)
    while loop.run(10):
        pass
    assert arrived == [pytest.approx(1000 / 5e5 + LATENCY_S)]


@pytest.mark.parametrize("nic_in", [None, 1e8])
def test_the_transport_reads_one_message_of_a_link_after_the_other(nic_in: float | None) -> None:
    loop, net = links((None, nic_in), 1e6, transport_byte_s=2e-6)
    arrived: list[tuple[float, str]] = []
    for name, size in (("large", 1000), ("small", 10)):
        net.send("a", "b", size, lambda sent: arrived.append((loop.now_s, sent)), name)
    while loop.run(10):
        pass
    large_s = 1000 / 1e6 + LATENCY_S + 1000 * 2e-6
    assert arrived == [(pytest.approx(large_s), "large"), (pytest.approx(large_s + 10 * 2e-6), "small")]


def test_a_link_that_is_not_there_carries_nothing_and_cannot_change() -> None:
    nodes = tuple(cost_node(name, speed=1.0, max_layers=4) for name in NAMES)
    links = (Link(src="a", dst="b", bandwidth_bytes_per_s=1e6),)
    net = SimulatedLinks(ClusterProfile(model=model(4), nodes=nodes, links=links), EventLoop())
    net.scale("a", "b", 0.5)
    with pytest.raises(InputError, match="b -> a: the cluster has no such link, so its bandwidth cannot change"):
        net.scale("b", "a", 0.5)
    with pytest.raises(InputError, match="b -> a: the cluster has no such link, but the plan sends requests over it"):
        net.send("b", "a", 1, lambda _: None, None)
