"""The real HTTP server in front of an engine that makes its tokens up, and plain clients of it."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec

from helixbench.reference_server.http.app import ServedModel, make_app
from helixbench.reference_server.http.connection import make_server
from helixbench.reference_server.http.engine_protocol import (
    EngineUnavailable,
    Health,
    Load,
    NodeHealth,
    RequestFailed,
    RequestRefused,
    TokenOut,
)
from helixbench.reference_server.http.options import HttpOptions
from helixbench.reference_server.http.text import Text, TokenizerLike
from helixbench.solver.scheduling.requests import Request
from helixbench.solver.scheduling.work import Scores, TokenScore

EOS = 257
VOCAB_SIZE = 320
MAX_LEN = 200
MODEL = "org/toy"
TEXT = "héllo 日本 😀!"
WAIT_S = 60.0  # for what is sure to come: a busy machine may take long


class FakeEngine:
    """Answers every prompt with ``TEXT`` again and again, then eos; what a prompt begins with can make it misbehave.

    The score of a token is its id with a minus, and the likeliest tokens in its place are those just below it.
    """

    def __init__(self) -> None:
        self.is_ready = True
        self.calls: list[Request] = []
        self.clients: list[object] = []
        self.num_running = 0
        self.num_aborted = 0
        self.load_now = Load(num_running=0, num_waiting=0, waiting_tokens=0, kv_usage=0.0)
        self.outputs = [*TEXT.encode(), EOS]
        self.num_numbers: set[int] = set()
        self.drained: list[str] = []

    async def generate(self, request: Request, *, client: object) -> AsyncGenerator[TokenOut, None]:
        self.calls.append(request)
        self.clients.append(client)
        assert request.number not in self.num_numbers, "each request has a number of its own"
        self.num_numbers.add(request.number)
        word = bytes(token for token in request.prompt if token < 256).decode(errors="replace")
        if word.startswith("huge"):
            raise RequestRefused("needs 900 tokens of KV cache, node small holds 500")
        if word.startswith("down"):
            raise EngineUnavailable("node small died")
        if word.startswith("spoilt"):
            raise RequestFailed("the logits are not finite")
        if word.startswith("bug"):
            raise KeyError("bug")
        self.num_running += 1
        is_done = False
        try:
            if word.startswith("mute"):
                await asyncio.sleep(WAIT_S)
            while word.startswith("endless"):  # until it is aborted
                await asyncio.sleep(0.001)
                yield TokenOut(104)
            for number in range(request.max_tokens):
                token = self.outputs[number % len(self.outputs)]
                if number == 3 and word.startswith("hang"):
                    await asyncio.sleep(WAIT_S)
                if number == 3 and word.startswith("die"):
                    raise EngineUnavailable("node small died")
                if number == 3 and word.startswith("end"):
                    return
                await asyncio.sleep(0)
                is_stop = token in request.stop_token_ids and number >= request.min_tokens
                is_done = is_stop or number == request.max_tokens - 1
                reason: Any = "stop" if is_stop else "length" if is_done else ""
                yield TokenOut(token, is_done, reason, self._scores(request, token, is_first=number == 0))
                if is_done:
                    return
        finally:
            self.num_running -= 1
            self.num_aborted += not is_done

    def drain(self, node: str) -> None:
        self.drained.append(node)

    def health(self) -> Health:
        if self.is_ready:
            return Health(is_ready=True, nodes={"small": NodeHealth(state="idle")})
        return Health(is_ready=False, detail="node small does not answer", nodes={"small": NodeHealth(state="lost")})

    def load(self) -> Load:
        return self.load_now

    def _scores(self, request: Request, token: int, *, is_first: bool) -> Scores | None:
        num_top = request.sampling.num_logprobs
        if num_top is None:
            return None

        def score(one: int) -> TokenScore:
            return TokenScore(-float(one), tuple((one - below, -float(one - below)) for below in range(1, num_top + 1)))

        prompt = request.prompt[1:] if request.is_prompt_scored and is_first else ()
        return Scores(request.number, score(token), tuple(score(one) for one in prompt))


class Served(NamedTuple):
    """A running server."""

    engine: FakeEngine
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port


@contextmanager
def serving(tokenizer: TokenizerLike, options: HttpOptions | None = None, **model: Any) -> Iterator[Served]:
    """The server as ``helixbench serve`` runs it, but for the engine."""
    options = options or HttpOptions()
    engine = FakeEngine()
    served = ServedModel(names=(MODEL,), max_tokens=MAX_LEN, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({EOS}))
    text = Text(tokenizer, max_tokens=MAX_LEN)
    app = make_app(engine, text=text, model=msgspec.structs.replace(served, **model), options=options)
    try:
        with running_server(app, options) as (host, port):
            yield Served(engine, host, port)
    finally:
        text.close()


@contextmanager
def running_server(app: Any, options: HttpOptions) -> Iterator[tuple[str, int]]:
    """An application behind the guarded server, in a thread; host and port."""
    server = make_server(app, options)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)  # else the system takes megabytes of an answer
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
        assert not thread.is_alive()


def until(is_true: Callable[[], Any]) -> None:
    """Wait until it is true."""
    deadline = time.perf_counter() + WAIT_S
    while not is_true():
        assert time.perf_counter() < deadline, "did not come about"
        time.sleep(0.002)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        return error


def ask(
    url: str, method: str, path: str, content: bytes | None = None, headers: dict[str, str] | None = None
) -> Answer:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=WAIT_S)
    try:
        connection.request(method, path, content, headers or {})
        answer = connection.getresponse()
        lower = {name.lower(): value for name, value in answer.headers.items()}
        return Answer(answer.status, lower, answer.read().decode())
    finally:
        connection.close()


def post(url: str, path: str = "/v1/completions", **body: Any) -> Answer:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    return ask(url, "POST", path, json.dumps({"model": MODEL} | prompt | body).encode())


def events_of(text: str) -> list[Any]:
    """Server-sent events, each decoded; the last one, ``[DONE]``, as that text."""
    parts = text.split("\n\n")
    assert parts.pop() == "", "an event ends with an empty line"
    assert all(part.startswith("data: ") for part in parts)
    return [part[6:] if part[6:] == "[DONE]" else json.loads(part[6:]) for part in parts]


def metric(url: str, name: str) -> float:
    """Value of a metric, labels included in the name; 0 where there is none yet."""
    for line in ask(url, "GET", "/metrics").text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[-1])
    return 0.0
