"""The engine in a thread of its own, open to the coroutines of the HTTP server."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import TypeAlias

from helixbench.errors import HelixbenchError, MeasurementError
from helixbench.reference_server.coordinator.engine import Engine
from helixbench.reference_server.http.engine_protocol import (
    EngineUnavailable,
    Health,
    Load,
    NodeHealth,
    RequestFailed,
    RequestRefused,
    TokenOut,
)
from helixbench.reference_server.http.fair_queue import FairQueue
from helixbench.solver.scheduling.requests import Request, TokenEvent

_log = logging.getLogger(__name__)
_POLL_MS = 1_000
_COUNTERS_EVERY_S = 5.0  # emulated nodes are asked for their late iterations


class _Stream:
    """One request's tokens on their way from the engine's thread to the HTTP server's event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[TokenOut | Exception] = asyncio.Queue()

    def put(self, item: TokenOut | Exception) -> None:
        """On the event loop."""
        self._queue.put_nowait(item)

    async def get(self) -> TokenOut:
        """The next token; raises what came instead of it."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item


_News: TypeAlias = list[tuple[_Stream, TokenOut | Exception]]


class EngineThread:
    """The engine, run by one thread, open to coroutines.

    Requests wait in a queue in which clients take turns, one at a time of them in the coordinator's, which keeps the
    order of arrival. What else coroutines want lies in an inbox until the thread takes it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: deque[Callable[[], None]] = deque()  # to be done by the engine's thread
        self._queue = FairQueue()
        self._streams: dict[int, _Stream] = {}  # request that has not ended -> who waits for its tokens
        self._failure: HelixbenchError | None = None
        self._is_stopping = False
        self._health = health_of(engine)  # as the engine's thread saw it last
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        engine.agents.watch(self._wake_read)
        self._thread = threading.Thread(target=self._run, name="engine")
        self.on_failure: Callable[[], None] = lambda: None

    @property
    def failure(self) -> HelixbenchError | None:
        """Why the engine has ended before it was told to."""
        return self._failure

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for it."""
        self._is_stopping = True
        self._wake()
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def health(self) -> Health:
        """Whether requests are served."""
        if self._failure is not None:
            return Health(is_ready=False, detail=str(self._failure))
        return self._health

    def drain(self, node: str) -> None:
        """See ``EngineLike.drain``."""
        self._do(lambda: self._engine.drain(node))

    def end_streams(self, message: str) -> None:
        """Those that wait for tokens get this error instead."""

        def end() -> None:
            while self._queue.take() is not None:
                continue
            streams = [(number, self._streams.pop(number, None)) for number in list(self._streams)]
            for number, _ in streams:
                self._abort(number)
            self._deliver([(stream, EngineUnavailable(message)) for _, stream in streams if stream is not None])

        self._do(end)

    def load(self) -> Load:
        """Requests and KV slots; numbers of the engine's thread, each read at once."""
        coordinator = self._engine.coordinator
        return Load(
            num_running=coordinator.num_in_flight,
            num_waiting=len(self._queue) + coordinator.num_waiting,
            waiting_tokens=self._queue.num_tokens,
            kv_usage=coordinator.kv_usage,
            late_iterations=self._engine.late_iterations,
        )

    async def generate(self, request: Request, *, client: object) -> AsyncGenerator[TokenOut, None]:
        """The tokens that follow the prompt; see ``EngineLike.generate``."""
        stream = _Stream()
        self._streams[request.number] = stream
        self._queue.add(request, client)
        self._wake()
        is_over = False
        try:
            while not is_over:
                out = await stream.get()
                is_over = out.finished
                yield out
        except (RequestRefused, EngineUnavailable):
            is_over = True
            raise
        finally:
            if not is_over:
                self._streams.pop(request.number, None)
                if not self._queue.remove(request.number):
                    self._do(lambda: self._abort(request.number))

    def _do(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        self._wake()

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"!")
        except BlockingIOError:
            return  # it is full of wakes already

    def _submit_next(self) -> None:
        """Let in those whose turn it is, until one of them waits for KV slots."""
        while self._engine.coordinator.num_waiting == 0 and (request := self._queue.take()) is not None:
            try:
                self._tell(self._engine.submit([request]))
            except ValueError as error:
                stream = self._streams.pop(request.number, None)
                self._deliver([(stream, RequestRefused(str(error)))] if stream is not None else [])

    def _abort(self, number: int) -> None:
        if self._failure is None:
            self._tell(self._engine.abort(number))

    def _run(self) -> None:
        asked_s = time.monotonic()
        while not self._is_stopping:
            try:
                while self._inbox:
                    self._inbox.popleft()()
                self._submit_next()
                if self._engine.is_emulated and time.monotonic() - asked_s > _COUNTERS_EVERY_S:
                    asked_s = time.monotonic()
                    self._engine.ask_counters()
                self._engine.step(_POLL_MS, on_events=self._tell_and_go_on)
                self._health = health_of(self._engine)
                self._drain_wakes()
            except HelixbenchError as error:
                self._fail(error)
            except Exception as error:  # our own fault; the requests must not wait for a thread that has ended
                _log.exception("the engine's thread failed")
                self._fail(MeasurementError(f"the engine failed: {error!r}; the log has the traceback"))

    def _drain_wakes(self) -> None:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return

    def _fail(self, error: HelixbenchError) -> None:
        """Tell all who wait, and those who come later, until the thread is stopped."""
        _log.error("%s", error)
        self._failure = error
        self.on_failure()
        while not self._is_stopping:
            self._inbox.clear()
            while self._queue.take() is not None:
                continue
            streams = [self._streams.pop(number, None) for number in list(self._streams)]
            self._deliver([(stream, EngineUnavailable(str(error))) for stream in streams if stream is not None])
            threading.Event().wait(0.05)

    def _tell_and_go_on(self, events: list[TokenEvent]) -> list[Request]:
        self._tell(events)
        return []

    def _tell(self, events: list[TokenEvent]) -> None:
        news: _News = []
        for event in events:
            stream = self._streams.pop(event.request, None) if event.reason else self._streams.get(event.request)
            if stream is None or event.reason == "abort":
                continue
            if event.reason == "error":
                lost = EngineUnavailable("a node failed, and those that are left cannot finish this request")
                news.append((stream, RequestFailed(event.detail) if event.detail else lost))
            elif event.token is not None:
                news.append((stream, TokenOut(event.token, bool(event.reason), event.reason, event.scores)))
        self._deliver(news)

    def _deliver(self, news: _News) -> None:
        """Hand over what one moment brought: one wake of the event loop, however many requests got a token."""
        by_loop: dict[asyncio.AbstractEventLoop, _News] = {}
        for stream, item in news:
            by_loop.setdefault(stream.loop, []).append((stream, item))
        for loop, items in by_loop.items():
            loop.call_soon_threadsafe(_put_all, items)


def health_of(engine: Engine) -> Health:
    """How an engine's nodes stand; for the thread that runs it."""
    adaptation = engine.adaptation
    if adaptation is None:
        return Health(is_ready=True)
    watch = adaptation.watch
    ratios = watch.ratios
    nodes = {}
    for node, state in watch.states.items():
        report = watch.last_report(node)
        age_s = None if report is None else report.progress_age_s
        nodes[node] = NodeHealth(state=state.value, ratio=ratios[node], progress_age_s=age_s)
    missing = ", ".join(sorted(adaptation.lost | adaptation.passed_over))
    detail = "" if engine.is_covered else f"the nodes that take requests do not cover the model; without {missing}"
    return Health(is_ready=engine.is_covered, detail=detail, nodes=nodes, recovered=adaptation.num_recovered)


def _put_all(news: _News) -> None:
    for stream, item in news:
        stream.put(item)
