"""Requests that no client should send. ``python -m tests.reference_server.http.hostile`` sends many and measures.

Each attack goes to a running server and returns what the server said, so that a test can hold it against what it ought
to say. The command also measures how long ``/health`` takes meanwhile, and what is left of memory, files and KV slots.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from helixbench.reference_server.http.openai.requests import ChatBody, CompletionBody, TokenizeBody
from tests.reference_server.http.serving import WAIT_S

Address = tuple[str, int]
MANY_CHOICES = 10**9


def body_request(body: bytes, path: str = "/v1/completions", headers: str = "connection: close\r\n") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body


def exchange(address: Address, data: bytes) -> tuple[int, bytes]:
    """Status and body of the answer; status 0 where the server closed without one."""
    with socket.create_connection(address, timeout=WAIT_S) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may answer before it has all
            client.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := client.recv(2**16):
                received += data
    while received.startswith(b"HTTP/1.1 100"):
        received = received.partition(b"\r\n\r\n")[2]
    if not received:
        return 0, b""
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


def post(address: Address, body: dict[str, Any], path: str = "/v1/completions") -> tuple[int, bytes]:
    return exchange(address, body_request(json.dumps(body).encode(), path))


def error_code(answer: tuple[int, bytes]) -> tuple[int, str | None]:
    status, body = answer
    return status, json.loads(body)["error"]["code"]


def many_prompts(address: Address) -> tuple[int, str | None]:
    """100 000 prompts in half a megabyte."""
    return error_code(post(address, {"prompt": ["a"] * 100_000, "max_tokens": 1}))


def many_token_prompts(address: Address) -> tuple[int, str | None]:
    return error_code(post(address, {"prompt": [[1]] * 100_000, "max_tokens": 1}))


def huge_body(address: Address) -> tuple[int, str | None]:
    """31 MB of text."""
    return error_code(post(address, {"prompt": "hello " * 5_200_000}))


def long_text(address: Address) -> tuple[int, str | None]:
    """As much text as a body holds."""
    return error_code(post(address, {"prompt": "hello " * 1_300_000}))


def long_chat(address: Address) -> tuple[int, str | None]:
    messages = [{"role": "user", "content": ""}] * 150_000
    return error_code(post(address, {"messages": messages}, "/v1/chat/completions"))


def many_stops(address: Address) -> tuple[int, str | None]:
    """400 000 stop strings."""
    return error_code(post(address, {"prompt": "x", "stop": [f"{number:x}" for number in range(400_000)]}))


def many_choices(address: Address) -> tuple[int, str | None]:
    return error_code(post(address, {"prompt": "x", "n": MANY_CHOICES}))


def deep_nesting(address: Address) -> tuple[int, str | None]:
    return error_code(exchange(address, body_request(b'{"prompt": ' + b"[" * 2_000_000)))


def endless_header(address: Address) -> tuple[int, str | None]:
    return error_code(exchange(address, b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 200_000))


def leaving(address: Address, count: int, seed: int = 0) -> Counter[str]:
    """Clients that send a whole request and go at some moment, some with a reset."""
    draw = random.Random(seed)
    gone: Counter[str] = Counter()
    for _ in range(count):
        body = {"prompt": "x", "max_tokens": 150, "n": draw.choice((1, 2, 5)), "stream": draw.random() < 0.5}
        with socket.create_connection(address, timeout=WAIT_S) as client:
            client.sendall(body_request(json.dumps(body | {"ignore_eos": True, "temperature": 0}).encode()))
            client.settimeout(draw.choice((0.001, 0.01, 0.05)))
            with contextlib.suppress(TimeoutError):
                client.recv(draw.choice((1, 500)))
            is_reset = draw.random() < 0.5
            if is_reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gone["reset" if is_reset else "closed"] += 1
    return gone


@contextlib.contextmanager
def half_sent(address: Address, count: int) -> Iterator[list[socket.socket]]:
    """Connections whose requests stop somewhere."""
    whole = body_request(b'{"prompt": "x"}')
    with contextlib.ExitStack() as stack:
        clients = []
        for number in range(count):
            client = stack.enter_context(socket.create_connection(address, timeout=WAIT_S))
            client.sendall(whole[: number % (len(whole) - 1)])
            clients.append(client)
        yield clients


@contextlib.contextmanager
def stalled_readers(address: Address, count: int, num_outputs: int = 100) -> Iterator[list[socket.socket]]:
    """Clients that ask for much and take nothing of it."""
    body = {"prompt": "x", "max_tokens": 60, "n": num_outputs, "stream": True, "ignore_eos": True, "logprobs": 20}
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(address)
            client.sendall(body_request(json.dumps(body).encode()))
            clients.append(client)
        yield clients


ATTACKS: dict[str, tuple[Callable[[Address], tuple[int, str | None]], tuple[int, str | None]]] = {
    "100 000 prompts": (many_prompts, (400, None)),
    "100 000 prompts of token ids": (many_token_prompts, (400, None)),
    "31 MB of text": (huge_body, (413, None)),
    "8 MB of text": (long_text, (400, "context_length_exceeded")),
    "150 000 messages": (long_chat, (400, "context_length_exceeded")),
    "400 000 stop strings": (many_stops, (400, None)),
    "a billion choices": (many_choices, (400, None)),
    "2 000 000 brackets": (deep_nesting, (400, None)),
    "an endless header": (endless_header, (400, None)),
}

FIELDS: tuple[str, ...] = (
    *{**CompletionBody.__annotations__, **ChatBody.__annotations__, **TokenizeBody.__annotations__},
    *("temperature", "top_k", "seed", "stop", "n", "stream", "stream_options", "stop_token_ids", "tokens", "tools"),
    *("response_format", "logit_bias", "metadata", "colour"),
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**63,
        -(2**63),
        2**64,
        10**30,
        1e308,
        -0.0,
        0.5,
        1.5,
        "",
        "x",
        "\0",
        "\ud800",
    ),
    *("日本😀", "a" * 5000, [], [[]], [None], ["a", 1], [[1], "a"], [1, 2, 3], [-1], [2**40], ["", "a"], {}, {"a": {}}),
    *({"include_usage": 3}, {"type": "json_object"}, [{"role": "user"}], [{"role": 1, "content": []}], [{}], [[[1]]]),
    *([{"role": "user", "content": [{"type": "text", "text": 1}]}], [{"role": "user", "content": "<|eos|>"}], [True]),
)
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


def malformed(draw: random.Random) -> bytes:
    """A request with something wrong in it, or now and then nothing."""
    kind = draw.randrange(12)
    path = draw.choice(PATHS)
    fields = {draw.choice(FIELDS): draw.choice(VALUES) for _ in range(draw.randrange(4))}
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    given = ({"max_tokens": 2} | prompt | fields) if draw.random() < 0.9 else fields
    body = json.dumps(given).encode()
    if kind == 0:
        body = body[: draw.randrange(len(body))]
    elif kind == 1:
        place = draw.randrange(len(body))
        body = body[:place] + draw.randbytes(draw.randrange(1, 6)) + body[place + 1 :]
    elif kind == 2:
        body = draw.randbytes(draw.randrange(300))
    elif kind == 3:
        body = body.replace(b"}", b', "temperature": NaN}', 1).replace(b"2", b"Infinity", 1)
    elif kind == 4:
        return body_request(
            body, path, f"connection: close\r\ncontent-type: {draw.choice(('text/plain', 'a;b', ''))}\r\n"
        )
    elif kind == 5:
        method = draw.choice(("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "BREW", "get"))
        target = draw.choice((*PATHS, "/", "//", "/v1/models/%00", "/v1/models/" + "x" * 3000, "/metrics?x=%zz", "*"))
        return f"{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
    elif kind == 6:
        length = draw.choice(("-1", "x", "1e3", "99999999999999999999", "3, 4", "0x10", ""))
        return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n".encode() + body
    elif kind == 7:
        chunk = draw.choice(
            (b"zz\r\n", b"-5\r\nabc\r\n", b"ffffffffffffffffffff\r\n", b"3\r\nabcdef\r\n0\r\n\r\n", b"\r\n\r\n")
        )
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        return head.encode() + chunk
    elif kind == 8:
        return draw.randbytes(draw.randrange(1, 200)) + b"\r\n\r\n"
    return body_request(body, path)


def send_malformed(address: Address, request: bytes) -> int:
    """Status of the answer; the client sends no more after its request.

    Raises:
        AssertionError: an answer that no request deserves.
    """
    with socket.create_connection(address, timeout=WAIT_S) as client:
        with contextlib.suppress(OSError):  # refused while it was being sent
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := client.recv(2**16):
                received += data
    while received.startswith(b"HTTP/1.1 100"):
        received = received.partition(b"\r\n\r\n")[2]
    if not received:
        return 0
    status = int(received.split(b" ", 2)[1])
    assert 200 <= status < 500, (request, received[:500])
    return status


def health(address: Address) -> int:
    """Status of ``/health``, over a connection of its own."""
    connection = http.client.HTTPConnection(*address, timeout=WAIT_S)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def greedy(address: Address) -> str:
    """A short greedy answer."""
    status, body = post(address, {"prompt": "Once upon", "max_tokens": 20, "temperature": 0})
    assert status == 200, body
    text: str = json.loads(body)["choices"][0]["text"]
    return text


class HealthWatch:
    """Asks for health again and again while other things happen, in a process of its own; seconds of each answer."""

    def __init__(self, address: Address) -> None:
        self.seconds: list[float] = []
        self.statuses: Counter[int] = Counter()
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_watch_health, args=(address, theirs))

    def __enter__(self) -> HealthWatch:
        self._process.start()
        assert self._ours.recv() == "begun"
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.send("end")
        self.seconds, self.statuses = self._ours.recv()
        self._process.join()


def _watch_health(address: Address, pipe: Connection) -> None:
    seconds: list[float] = []
    statuses: Counter[int] = Counter()
    pipe.send("begun")
    while not seconds or not pipe.poll(0.01):
        begin = time.perf_counter()
        statuses[health(address)] += 1
        seconds.append(time.perf_counter() - begin)
    pipe.send((seconds, statuses))


def main() -> None:
    """Attack a server that runs, and print what became of it."""
    parser = argparse.ArgumentParser(description="Attack a helixbench server and measure its health meanwhile.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True, help="of the server's process")
    parser.add_argument("--count", type=int, default=10_000, help="of malformed requests")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    address = ("127.0.0.1", options.port)
    answer = greedy(address)

    def measure(name: str, attack: Callable[[], object]) -> None:
        with HealthWatch(address) as watch:
            found = attack()
        worst = sorted(watch.seconds)
        assert set(watch.statuses) <= {200}, watch.statuses
        assert greedy(address) == answer, "another greedy answer than before"
        files = len(os.listdir(f"/proc/{options.pid}/fd"))
        status = Path(f"/proc/{options.pid}/status").read_text()
        rss_mib = int(status.split("VmRSS:")[1].split()[0]) / 1024
        print(
            f"{name:32} health p50 {worst[len(worst) // 2] * 1e3:5.0f} ms, most {worst[-1] * 1e3:5.0f} ms;"
            f" {rss_mib:5.0f} MiB, {files} files; {found}",
            flush=True,
        )

    def some_half_sent() -> str:
        with half_sent(address, 400):
            return greedy(address)[:0] + "400 connections held"

    def some_stalled() -> str:
        with stalled_readers(address, 5):
            return greedy(address)[:0] + "5 readers held"

    def fuzz() -> Counter[int]:
        draw = random.Random(options.seed)
        return Counter(send_malformed(address, malformed(draw)) for _ in range(options.count))

    measure("nothing", lambda: time.sleep(2))
    for name, (attack, _) in ATTACKS.items():
        measure(name, lambda attack=attack: attack(address))  # type: ignore[misc]
    measure("400 half-sent requests", some_half_sent)
    measure("5 stalled readers", some_stalled)
    measure("300 that leave", lambda: leaving(address, 300))
    measure(f"{options.count} malformed", fuzz)
    time.sleep(2)
    measure("nothing", lambda: time.sleep(2))


if __name__ == "__main__":
    main()
