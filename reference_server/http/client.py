"""One client's request: reading its body, noticing that it has gone, and streaming events to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from helixbench.reference_server.http.generation import SideBySide
from helixbench.reference_server.http.openai.answers import Answer, Piece
from helixbench.reference_server.http.openai.errors import ProtocolError

ResultT = TypeVar("ResultT")

BODIES_AT_ONCE = 32  # of the largest size, held by all requests together
_log = logging.getLogger(__name__)


class ClientGone(Exception):  # noqa: N818 - not an error
    """The client closed its connection."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of ``work``, which is cancelled when the client closes its connection.

    Raises:
        ClientGone: it did.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_leaves(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


class BodyBudget:
    """Memory for bodies: of each, and of all that are held at once."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, counted until it is dealt with.

        Raises:
            ProtocolError: 413, it is too large; 503, too many others are held.
        """
        chunks: list[bytes] = []
        num_bytes = 0
        try:
            async for chunk in request.stream():
                num_bytes += len(chunk)
                self._held_bytes += len(chunk)
                if num_bytes > self._max_bytes:
                    raise ProtocolError(413, f"the body is larger than {self._max_bytes} bytes")
                if self._held_bytes > BODIES_AT_ONCE * self._max_bytes:
                    raise ProtocolError(503, "too many large requests at once; try again later")
                chunks.append(chunk)
            yield b"".join(chunks)
        finally:
            self._held_bytes -= num_bytes


class EventStream(Response):
    """Server-sent events, one per output token. However it ends, the requests behind it have ended too.

    An error after the first event is an event of its own, and the body breaks off: some clients count what ends in
    order as a success.
    """

    def __init__(
        self,
        pieces: SideBySide,
        first: Piece,
        answer: Answer,
        error_of: Callable[[BaseException], ProtocolError | None],
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._pieces = pieces
        self._first = first
        self._answer = answer
        self._error_of = error_of

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, unless the client goes."""
        try:
            await unless_gone(receive, self._send(send))
        except ClientGone:
            return
        finally:
            self._pieces.cancel()

    async def _send(self, send: Send) -> None:
        async def send_event(data: bytes) -> None:
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send_event(self._answer.event(self._first))
        try:
            async for piece in self._pieces:
                await send_event(self._answer.event(piece))
        except Exception as error:
            told = self._error_of(error)
            if told is None:
                _log.exception("a completion failed")
                told = ProtocolError(500, "internal error; the server's log has more")
            await send_event(msgspec.json.encode(told.body()))
            return  # without the last part of the body: the server closes the connection
        usage = self._answer.usage_event()
        if usage is not None:
            await send_event(usage)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
