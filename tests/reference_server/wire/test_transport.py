from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from helixbench.errors import InputError, MeasurementError
from helixbench.reference_server.wire import client, transport
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.keys import ClusterKey, load_key_file, make_key_file
from helixbench.reference_server.wire.messages import (
    Describe,
    Description,
    Done,
    Shutdown,
    decode_answer,
    decode_command,
)
from helixbench.reference_server.wire.transport import Transport, own_address, reply, send

ARRIVES_MS = 5_000
HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def new_key(folder: Path, name: str) -> ClusterKey:
    make_key_file(folder / name)
    return load_key_file(folder / name)


@contextmanager
def opened(key: ClusterKey) -> Iterator[Transport]:
    made = Transport(key)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def key(tmp_path: Path) -> ClusterKey:
    return new_key(tmp_path, "cluster.key")


def test_holders_of_the_key_talk_both_ways(key: ClusterKey) -> None:
    with opened(key) as server, opened(key) as other:
        router, address = server.listen("127.0.0.1:0")
        dealer = other.connect(address)
        payload = bytes(range(256)) * 100

        sent = send(dealer, Describe(), payload)
        identity, header, received = router.recv_multipart()
        answered = reply(router, identity, Done(), memoryview(payload))
        answer, back = dealer.recv_multipart()

        assert (decode_command(header), received) == (Describe(), payload)
        assert (decode_answer(answer), back) == (Done(), payload)
        assert sent == len(header) + len(payload)
        assert answered == len(answer) + len(payload)


@pytest.mark.parametrize(
    ("listens_at", "own"),
    [("0.0.0.0:5", "127.0.0.1:5"), ("*:5", "127.0.0.1:5"), ("[::]:5", "[::1]:5"), ("10.0.0.7:5", "10.0.0.7:5")],
)
def test_a_process_reaches_itself_wherever_it_listens(listens_at: str, own: str) -> None:
    assert own_address(listens_at) == own


def test_ipv6_addresses_are_served(key: ClusterKey) -> None:
    with opened(key) as server, opened(key) as other:
        try:
            router, address = server.listen("[::1]:0")
        except InputError:
            pytest.skip("this machine has no IPv6 loopback address")
        assert address.startswith("[::1]:")
        dealer = other.connect(address)
        send(dealer, Describe())
        assert decode_command(router.recv_multipart()[1]) == Describe()


def stranger(
    context: zmq.Context[zmq.Socket[bytes]], *, server: ClusterKey | None, own: ClusterKey | None
) -> zmq.Socket[bytes]:
    """A socket that takes itself for a member: with these keys, or without any encryption."""
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    if server is not None and own is not None:
        dealer.curve_serverkey = server.public.encode()
        dealer.curve_publickey, dealer.curve_secretkey = own.public.encode(), own.secret.encode()
    return dealer


@pytest.mark.parametrize("kind", ["another key", "knows the public half", "no encryption"])
def test_others_are_not_let_in(key: ClusterKey, tmp_path: Path, kind: str) -> None:
    other = new_key(tmp_path, "other.key")
    keys = {"another key": (other, other), "knows the public half": (key, other), "no encryption": (None, None)}[kind]
    with opened(key) as server, opened(key) as member:
        router, address = server.listen("127.0.0.1:0")
        monitor = router.get_monitor_socket(HANDSHAKE_FAILURES)
        dealer = stranger(member.context, server=keys[0], own=keys[1])
        dealer.connect(f"tcp://{address}")
        send(dealer, Shutdown())

        assert monitor.poll(ARRIVES_MS), "the handshake was not refused"
        recv_monitor_message(monitor)
        friend = member.connect(address)
        send(friend, Describe())
        _, header = router.recv_multipart()

        assert decode_command(header) == Describe(), "the stranger's message was let in"
        assert not router.poll(100)
        router.disable_monitor()
        monitor.close()


def test_an_agent_with_another_key_is_not_there(
    key: ClusterKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_CONNECT_S", 2.0)
    with opened(new_key(tmp_path, "other.key")) as server:
        _, address = server.listen("127.0.0.1:0")
        with Agents({"n0": address}, key) as agents, pytest.raises(InputError) as raised:
            agents.describe()

    assert "n0" in str(raised.value)
    assert address in str(raised.value)
    assert "holding the same key?" in str(raised.value)


def test_nothing_listening_is_an_agent_that_is_not_there(key: ClusterKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_CONNECT_S", 0.3)
    silent = {"n0": "127.0.0.1:1", "n1": "127.0.0.1:2"}
    message = r"no answer within 0 s from n0 \(127.0.0.1:1\), n1 \(127.0.0.1:2\)"
    with Agents(silent, key) as agents, pytest.raises(InputError, match=message):
        agents.describe()


def test_answers_of_the_wrong_kind_are_an_error(key: ClusterKey) -> None:
    with opened(key) as server:
        router, address = server.listen("127.0.0.1:0")
        with Agents({"n0": address}, key) as agents:
            agents.send("n0", Describe())
            identity, *_ = router.recv_multipart()
            reply(router, identity, Done())
            with pytest.raises(MeasurementError, match="node n0: answered Done, not Description"):
                agents.ask_one("n0", Describe(), Description, timeout_s=5)


def test_an_oversized_frame_is_dropped_with_its_connection(key: ClusterKey, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(key) as server, opened(key) as member:
        monkeypatch.setattr(transport, "MAX_FRAME_BYTES", 1000)
        router, address = server.listen("127.0.0.1:0")
        monitor = router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        monkeypatch.undo()
        first, second = member.connect(address), member.connect(address)
        send(first, Describe(), bytes(2000))

        assert monitor.poll(ARRIVES_MS), "the frame was taken in"
        recv_monitor_message(monitor)
        send(second, Describe(), bytes(500))
        _, _, payload = router.recv_multipart()

        assert len(payload) == 500
        router.disable_monitor()
        monitor.close()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1", "need HOST:PORT, like"),
        ("no-port:", "need HOST:PORT, like"),
        ("", "need HOST:PORT, like"),
        ("127.0.0.1:-1", "need HOST:PORT, like"),
        ("::1:9000", "an IPv6 address needs brackets"),
        ("256.0.0.1:80", "cannot be bound .* need a free HOST:PORT of this machine"),
        ("127.0.0.1:99999", "with a port of 0 to 65535"),
    ],
)
def test_listening_at_what_is_no_address_is_one_message(key: ClusterKey, address: str, said: str) -> None:
    with opened(key) as server, pytest.raises(InputError, match=f"^--listen {address}: .*{said}"):
        server.listen(address)


def test_an_address_in_use_is_one_message(key: ClusterKey) -> None:
    with opened(key) as server:
        _, address = server.listen("127.0.0.1:0")
        with pytest.raises(InputError, match=f"--listen {address}: cannot be bound"):
            server.listen(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "", "host:port", "127.0.0.1:0", "127.0.0.1:65536"])
def test_connecting_to_what_is_no_address_is_one_message(key: ClusterKey, address: str) -> None:
    with opened(key) as member, pytest.raises(InputError, match="not an address of the form HOST:PORT"):
        member.connect(address)
