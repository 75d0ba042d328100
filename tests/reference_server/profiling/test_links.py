"""One link: what is measured over iperf3 and over the server's own transport, and what is said where it fails."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from helixbench.profiler.network.iperf3 import INTERVAL_S
from helixbench.reference_server.profiling import links as link_probe
from helixbench.reference_server.profiling.links import IperfServers, measure_flows, measure_link, measure_transport
from helixbench.reference_server.wire.keys import ClusterKey, load_key_file, make_key_file
from helixbench.reference_server.wire.messages import Flow, LinkMeasured, MeasureFlows, MeasureLink
from helixbench.reference_server.wire.transport import Transport
from tests.reference_server.threads import agents_in_threads

needs_iperf3 = pytest.mark.skipif(shutil.which("iperf3") is None, reason="iperf3 is not installed")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    make_key_file(tmp_path / "cluster.key")
    return tmp_path / "cluster.key"


@pytest.fixture
def key(key_file: Path) -> ClusterKey:
    return load_key_file(key_file)


def measured(key: ClusterKey, command: MeasureLink) -> LinkMeasured:
    transport = Transport(key)
    try:
        return measure_link(transport, command)
    finally:
        transport.close()


@pytest.mark.parametrize("reverse", [False, True])
def test_without_iperf3_the_transport_measures_itself(
    key_file: Path, key: ClusterKey, no_iperf3: None, reverse: bool
) -> None:
    assert IperfServers().serve(2).ports == ()
    with agents_in_threads(["far"], key_file) as addresses:
        result = measured(key, MeasureLink(addresses["far"], None, seconds=0.05, reverse=reverse))

    assert result.iperf3 == ""
    assert result.error == ""
    assert result.bandwidth_bytes_per_s is not None
    assert result.bandwidth_bytes_per_s > 0
    assert result.latency_s is not None
    assert result.latency_s > 0


def test_the_transports_time_is_what_it_takes_beyond_the_links(
    key_file: Path, key: ClusterKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Echoes take 2 ms there and back, and 1 ns per byte beyond links of 1 and 10 MB/s."""
    nodes = ("slow", "fast", "faster", "fastest")
    with agents_in_threads(nodes, key_file) as addresses:
        rates = {addresses[node]: 1e7 if node != "slow" else 1e6 for node in nodes}
        monkeypatch.setattr(
            link_probe._Probe,
            "_echo",
            lambda probe, payload=b"", reply_bytes=0: 2e-3 + len(payload) * (1e-9 + 1 / rates[probe._address]),
        )
        transport = Transport(key)
        try:
            own = measure_transport(transport, rates)
            ahead = measure_transport(transport, dict.fromkeys(rates, 1e6))
        finally:
            transport.close()

    assert own == (pytest.approx(1e-3), pytest.approx(1e-9))
    assert ahead.byte_s == 0, "a link that is faster than was said takes no time back"


@pytest.mark.parametrize(
    ("frame_s", "round_trip_s", "carries_s"), [(0.01, 0.002, 0.008), (0.01, 0.009, 0.005), (0.01, 0.5, 0.005)]
)
def test_a_frame_is_timed_without_its_round_trip_or_half_of_it(
    monkeypatch: pytest.MonkeyPatch, frame_s: float, round_trip_s: float, carries_s: float
) -> None:
    frames: list[int] = []

    def echo(_: object, payload: bytes | None = None, reply_bytes: int = 0) -> float:
        frames.append(len(payload or b"") + reply_bytes)
        return frame_s

    monkeypatch.setattr(link_probe._Probe, "_echo", echo)
    probe = object.__new__(link_probe._Probe)
    for reverse in (False, True):
        rate = probe.bytes_per_s(0.095, round_trip_s, reverse=reverse, rough=None)
        assert rate == pytest.approx((1 << 20) / carries_s)
    assert frames == [1 << 20] * 20, "as many as fit the time asked for"


def test_a_slow_link_gets_frames_that_it_carries_in_the_time_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_probe._Probe, "_echo", lambda _, payload=None, reply_bytes=0: len(payload) / 60e3)
    probe = object.__new__(link_probe._Probe)

    for rough in (50e3, 80e3):
        assert probe.bytes_per_s(1.5, 0.0, reverse=False, rough=rough) == pytest.approx(60e3, rel=1e-3)


@needs_iperf3
@pytest.mark.parametrize("reverse", [False, True])
def test_iperf3_measures_where_it_is_installed(key_file: Path, key: ClusterKey, reverse: bool) -> None:
    end = IperfServers()
    try:
        (port,) = end.serve(1).ports
        with agents_in_threads(["far"], key_file) as addresses:
            result = measured(key, MeasureLink(addresses["far"], port, seconds=0.2, reverse=reverse))
    finally:
        end.close()

    assert result.iperf3.startswith("iperf3 ")
    assert result.bandwidth_bytes_per_s is not None
    assert result.bandwidth_bytes_per_s > 0


@needs_iperf3
def test_flows_at_once_are_each_measured(key_file: Path, key: ClusterKey) -> None:
    end = IperfServers()
    try:
        there, back = end.serve(2).ports
        result = measure_flows(
            MeasureFlows((Flow("127.0.0.1", there, False, 1e9), Flow("127.0.0.1", back, True, 1e9)), 0.2)
        )
    finally:
        end.close()

    assert result.error == ""
    assert len(result.bytes_per_s) == 2
    assert min(result.bytes_per_s) > 1e6


@needs_iperf3
def test_a_flow_to_nobody_is_said_and_gives_no_number() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        result = measure_flows(MeasureFlows((Flow("127.0.0.1", closed.getsockname()[1], False, 1e9),), 0.2))

    assert result.bytes_per_s == ()
    assert "unable to connect" in result.error


@needs_iperf3
def test_a_link_whose_iperf3_fails_keeps_its_latency_and_says_why(key_file: Path, key: ClusterKey) -> None:
    with agents_in_threads(["far"], key_file) as addresses, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        command = MeasureLink(addresses["far"], closed.getsockname()[1], seconds=0.2, message_bytes=(64, 4096))
        result = measured(key, command)

    assert result.bandwidth_bytes_per_s is None
    assert "unable to connect" in result.error
    assert result.latency_s is not None
    assert [time.message_bytes for time in result.message_times] == [64, 4096]


@needs_iperf3
def test_a_port_that_was_taken_meanwhile_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    free = link_probe._free_ports
    end = IperfServers()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        given = iter([[port, *free(1)], [port]])
        monkeypatch.setattr(link_probe, "_free_ports", lambda count: next(given, None) or free(count))
        try:
            served = end.serve(2)
        finally:
            end.close()
        monkeypatch.setattr(link_probe, "_free_ports", lambda count: [port] * count)
        refused = end.serve(1)

    assert (len(set(served.ports)), served.error) == (2, "")
    assert port not in served.ports
    assert refused.ports == ()
    assert f"port {port} does not listen" in refused.error


@pytest.mark.parametrize("reverse", [False, True])
def test_messages_are_timed_until_the_next_would_take_too_long(monkeypatch: pytest.MonkeyPatch, reverse: bool) -> None:
    sent: list[int] = []

    def echo(_: object, payload: bytes | None = None, reply_bytes: int = 0) -> float:
        assert (payload is None) == reverse
        sent.append(len(payload or b"") + reply_bytes)
        return 0.004 + sent[-1] * 1e-6  # a round trip of 4 ms, 1 MB/s

    monkeypatch.setattr(link_probe._Probe, "_echo", echo)
    command = MeasureLink(
        "", None, seconds=1, reverse=reverse, message_bytes=(100_000, 10_000, 10**7), message_limit_s=1.0
    )
    times = object.__new__(link_probe._Probe).message_times(command, 0.002)

    assert [time.message_bytes for time in times] == [10_000, 100_000], "10 MB would take 10 s"
    assert [time.one_way_s for time in times] == pytest.approx([0.012, 0.102])
    assert sent == [10_000] * 4 + [100_000] * 3


@pytest.mark.parametrize(
    ("rough", "block"), [(None, None), (1e6, 4096), (10e6, 1 << 15), (1e9, 128 << 10), (1.0, 4096)]
)
def test_blocks_are_so_small_that_a_slow_links_interval_holds_many(rough: float | None, block: int | None) -> None:
    assert link_probe._block_bytes(rough) == block
    if block is not None and rough is not None and block > 4096:
        assert rough * INTERVAL_S / block >= link_probe._BLOCKS


def test_a_peer_that_does_not_echo_is_said(key: ClusterKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_probe, "_ANSWER_S", 0.2)
    result = measured(key, MeasureLink("127.0.0.1:1", None, seconds=0.1))

    assert result.error == "the agent at 127.0.0.1:1 did not echo within 0 s"
    assert (result.bandwidth_bytes_per_s, result.latency_s) == (None, None)
