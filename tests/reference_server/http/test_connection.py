"""Connections whose clients do not do their part: half-sent requests, readers that stall, too many at once."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from helixbench.errors import InputError
from helixbench.reference_server.http.connection import open_listener, url_of
from helixbench.reference_server.http.options import HttpOptions
from helixbench.reference_server.http.text import TokenizerLike
from tests.reference_server.http.serving import WAIT_S, Served, ask, post, serving, until

SHORT_S = 0.6


@pytest.fixture(scope="module")
def impatient(tokenizer: TokenizerLike) -> Iterator[Served]:
    options = HttpOptions(request_timeout_s=SHORT_S, stall_timeout_s=SHORT_S, max_connections=8)
    with serving(tokenizer, options) as served:
        yield served


@contextmanager
def connected(served: Served, data: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(served.address, timeout=WAIT_S) as client:
        client.sendall(data)
        yield client


def request(version: str = "1.1", **body: Any) -> bytes:
    content = json.dumps({"prompt": "x"} | body).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


def read_all(client: socket.socket) -> str:
    """All that comes until the server closes."""
    received = b""
    while data := client.recv(65536):
        received += data
    return received.decode()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "beginning",
    [
        b"P",
        request()[:40],
        request()[:-1],
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
    ],
)
def test_a_half_sent_request_is_told_so_and_ended(impatient: Served, beginning: bytes) -> None:
    with connected(impatient, beginning) as client:
        head, _, body = read_all(client).partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 408 Request Timeout")
    assert "no whole request within 0.6 s" in json.loads(body)["error"]["message"]


def test_a_request_that_trickles_in_is_ended_too(impatient: Served) -> None:
    def trickle(client: socket.socket) -> None:
        for byte in request():
            client.sendall(bytes([byte]))
            time.sleep(0.05)

    with connected(impatient) as client, pytest.raises((BrokenPipeError, ConnectionResetError)):
        trickle(client)


def test_a_connection_without_a_request_is_closed_without_a_word(impatient: Served) -> None:
    """A client that reuses a connection would take it for the answer to its next request."""
    with connected(impatient) as client:
        assert read_all(client) == ""
    with connected(impatient, request(max_tokens=1)) as client:
        assert read_all(client).count("HTTP/1.1") == 1


def test_hundreds_of_half_sent_requests_end_and_others_are_served_meanwhile(tokenizer: TokenizerLike) -> None:
    with serving(tokenizer, HttpOptions(request_timeout_s=SHORT_S)) as served, ExitStack() as stack:
        clients = [stack.enter_context(connected(served, request()[:50])) for _ in range(300)]
        assert ask(served.url, "GET", "/health").status == 200
        assert post(served.url).status == 200
        for client in clients:
            assert "408 Request Timeout" in read_all(client)
    assert served.engine.num_running == 0


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_half_closed_client_gets_its_answer(impatient: Served, stream: bool, version: str) -> None:
    with connected(impatient, request(version, stream=stream, max_tokens=100)) as client:
        client.shutdown(socket.SHUT_WR)
        received = read_all(client)
    interim, _, answer = received.rpartition("HTTP/1.1 200 OK")
    assert interim in ("", "HTTP/1.1 100 Continue\r\n\r\n")
    assert "usage" in answer or "[DONE]" in answer


def test_a_client_that_half_closes_and_then_goes_aborts_its_request(impatient: Served) -> None:
    before = impatient.engine.num_aborted
    with connected(impatient, request(prompt="mute")) as client:
        until(lambda: impatient.engine.num_running == 1)
        client.shutdown(socket.SHUT_WR)
        time.sleep(1.2)
        assert impatient.engine.num_running == 1, "it may still read"
    until(lambda: impatient.engine.num_aborted == before + 1)


def test_a_reader_that_takes_nothing_is_ended_and_its_requests_aborted(impatient: Served) -> None:
    before = impatient.engine.num_aborted
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(WAIT_S)
        client.connect(impatient.address)
        client.sendall(request(prompt="endless", stream=True, n=20))
        until(lambda: impatient.engine.num_running > 0)
        until(lambda: impatient.engine.num_running == 0)
        assert not read_all(client).endswith("0\r\n\r\n"), "what is missing is seen to be missing"
    assert impatient.engine.num_aborted > before
    assert post(impatient.url).status == 200


def test_a_slow_reader_gets_everything(tokenizer: TokenizerLike) -> None:
    """It takes something in every stall time."""
    with serving(tokenizer, HttpOptions(stall_timeout_s=3.0)) as served, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(served.address)
        client.sendall(
            request(stream=True, n=20, max_tokens=190, ignore_eos=True).replace(b"host", b"connection: close\r\nhost")
        )
        received = b""
        while data := client.recv(2**20):
            received += data
            time.sleep(0.001)
    assert received.count(b"data: {") == 20 * 190
    assert received.endswith(b"0\r\n\r\n")


def test_where_all_places_are_taken_the_oldest_half_sent_request_gives_way(impatient: Served) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(connected(impatient, request()[:50])) for _ in range(8)]
        time.sleep(0.1)  # until their beginnings have been read: what a server has not read it cannot answer
        assert post(impatient.url).status == 200
        assert "503 Service Unavailable" in read_all(clients[0])
        assert "408 Request Timeout" in read_all(clients[-1])


def test_where_all_places_are_busy_a_new_connection_is_told_to_come_back(impatient: Served) -> None:
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connected(impatient, request(prompt="mute")))
        until(lambda: impatient.engine.num_running == 8)
        with connected(impatient) as client:
            answer = read_all(client)
    assert answer.startswith("HTTP/1.1 503 Service Unavailable")
    assert "retry-after: 1" in answer
    assert "8 connections, all of them busy" in answer
    until(lambda: impatient.engine.num_running == 0)
    until(lambda: post(impatient.url).status == 200)


@pytest.mark.parametrize("garbage", [b"\x00\xff garbage\r\n\r\n", b"GET /\r\n\r\n", b"A" * 100_000])
def test_what_is_no_http_is_400_in_openais_format(impatient: Served, garbage: bytes) -> None:
    with connected(impatient, garbage) as client:
        head, _, body = read_all(client).partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 400 Bad Request")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_requests_one_after_the_other_on_one_connection(impatient: Served) -> None:
    last = request(max_tokens=2).replace(b"host", b"connection: close\r\nhost")
    with connected(impatient, request(max_tokens=1) * 3 + last) as client:
        assert read_all(client).count("HTTP/1.1 200 OK") == 4


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:"), ("[::1]", "http://[::1]:")]
)
def test_ipv4_and_ipv6_addresses_are_listened_on(host: str, url: str) -> None:
    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback address")
    with (
        open_listener(host, 0) as listener,
        socket.create_connection(listener.getsockname()[:2], timeout=WAIT_S),
    ):
        assert url_of(listener, host).startswith(url)


def test_the_any_address_of_ipv6_takes_ipv4_too() -> None:
    if not has_ipv6() or not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6 loopback address")
    with open_listener("::", 0) as listener:
        socket.create_connection(("127.0.0.1", listener.getsockname()[1]), timeout=WAIT_S).close()


@pytest.mark.parametrize("host", ["256.0.0.1", "::zz", "203.0.113.7"])
def test_an_address_that_is_not_this_machines_is_refused(host: str) -> None:
    with pytest.raises(InputError, match="cannot listen there"):
        open_listener(host, 0)
