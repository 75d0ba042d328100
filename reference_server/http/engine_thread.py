"""Serve requests over HTTP: the engine in a thread of its own, the HTTP front in the main one."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

import uvicorn

from helixbench.errors import HelixbenchError, MeasurementError
from helixbench.profiler.model.files import ModelFiles
from helixbench.reference_server.coordinator.engine import Engine
from helixbench.reference_server.http.app import make_app
from helixbench.reference_server.http.engine_protocol import EngineUnavailable, Health, RequestRefused, TokenOut
from helixbench.solver.scheduling.coordinator import Request, TokenEvent
from helixbench.solver.scheduling.work import SamplingParams

_log = logging.getLogger(__name__)
_POLL_MS = 1_000
_SHUTDOWN_GRACE_S = 5


class _Stream:
    """One request's tokens on their way from the engine's thread to the HTTP front's loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[TokenOut | Exception] = asyncio.Queue()

    def put(self, item: TokenOut | Exception) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def get(self) -> TokenOut:
        """The next token; raises what came instead of it."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item


class EngineThread:
    """The engine, run by one thread, open to coroutines; what they want lies in an inbox until the thread takes it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: deque[Callable[[], None]] = deque()  # to be done by the engine's thread
        self._streams: dict[int, _Stream] = {}  # request -> who waits for its tokens; the engine's thread alone
        self._next_number = 0
        self._failure: HelixbenchError | None = None
        self._is_stopping = False
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
        nodes = dict.fromkeys(self._engine.agents.addresses, "serving" if self._failure is None else "unknown")
        return Health(is_ready=self._failure is None, detail=str(self._failure or ""), nodes=nodes)

    async def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        stop_token_ids: frozenset[int],
    ) -> AsyncGenerator[TokenOut, None]:
        """The tokens that follow ``prompt``; see ``EngineLike.generate``."""
        stream = _Stream()
        number = self._next_number
        self._next_number += 1
        request = Request(
            number=number,
            prompt=tuple(prompt),
            max_tokens=max_tokens,
            sampling=sampling,
            stop_token_ids=stop_token_ids,
        )
        self._do(lambda: self._submit(request, stream))
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
                self._do(lambda: self._abort(number))

    def _do(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        self._wake()

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"!")
        except BlockingIOError:
            return  # it is full of wakes already

    def _submit(self, request: Request, stream: _Stream) -> None:
        if self._failure is not None:
            stream.put(EngineUnavailable(str(self._failure)))
            return
        self._streams[request.number] = stream
        try:
            self._tell(self._engine.submit([request]))
        except ValueError as error:
            del self._streams[request.number]
            stream.put(RequestRefused(str(error)))

    def _abort(self, number: int) -> None:
        if self._streams.pop(number, None) is not None:
            self._engine.abort(number)

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                while self._inbox:
                    self._inbox.popleft()()
                if self._failure is None:
                    self._engine.step(_POLL_MS, on_events=self._tell_and_go_on)
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
        _log.error("%s", error)
        self._failure = error
        for stream in self._streams.values():
            stream.put(EngineUnavailable(str(error)))
        self._streams.clear()
        self.on_failure()
        while not self._is_stopping:
            while self._inbox:
                self._inbox.popleft()()
            threading.Event().wait(0.05)

    def _tell_and_go_on(self, events: list[TokenEvent]) -> list[Request]:
        self._tell(events)
        return []

    def _tell(self, events: list[TokenEvent]) -> None:
        for event in events:
            stream = self._streams.get(event.request)
            if stream is None or event.token is None:
                continue
            if event.reason:
                del self._streams[event.request]
            reason = event.reason if event.reason != "abort" else ""
            stream.put(TokenOut(event.token, finished=bool(reason), reason=reason))


def serve_http(engine: Engine, files: ModelFiles, *, socket_fd: int) -> None:
    """Serve on a listening socket until SIGINT or SIGTERM, or until the engine fails.

    Raises:
        HelixbenchError: what ended the engine.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files.directory, local_files_only=True)
    running = EngineThread(engine)
    largest = engine.coordinator.largest_request_tokens()
    app = make_app(
        running,
        tokenizer=tokenizer,
        model_name=files.directory.name,
        max_model_len=min(largest + 1, files.max_sequence_tokens or largest + 1),
        vocab_size=files.vocab_size,
        eos_token_ids=files.eos_token_ids(),
    )
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_SHUTDOWN_GRACE_S)
    server = uvicorn.Server(config)

    def stop_server() -> None:
        server.should_exit = True

    running.on_failure = stop_server
    running.start()
    try:
        with socket.socket(fileno=os.dup(socket_fd)) as listener:
            server.run(sockets=[listener])
    finally:
        running.stop()
    if running.failure is not None:
        raise running.failure
