"""A completion as HTTP sends it: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence

import msgspec
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from helixbench.reference_server.http.completion import Piece, SideBySide
from helixbench.reference_server.http.protocol import Choice, Completion, ProtocolError, Usage, error_of_engine

logger = logging.getLogger(__name__)


class Answer:
    """What all parts of one answer share, and its token counts so far."""

    def __init__(self, model_name: str, num_prompt_tokens: int) -> None:
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model_name = model_name
        self._num_prompt_tokens = num_prompt_tokens
        self._num_output_tokens = 0

    def count(self, piece: Piece) -> Choice:
        """The piece as a choice; it is one output token."""
        self._num_output_tokens += 1
        return Choice(index=piece.index, text=piece.text, finish_reason=piece.finish_reason)

    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_output_tokens,
            total_tokens=self._num_prompt_tokens + self._num_output_tokens,
        )

    def encode(self, choices: Sequence[Choice], usage: Usage | msgspec.UnsetType | None = msgspec.UNSET) -> bytes:
        """JSON of an answer or of one event."""
        return msgspec.json.encode(
            Completion(id=self._id, created=self._created, model=self._model_name, choices=tuple(choices), usage=usage)
        )

    async def collect(self, pieces: SideBySide, num_prompts: int) -> bytes:
        """The whole answer."""
        texts: list[list[str]] = [[] for _ in range(num_prompts)]
        reasons: list[str | None] = [None] * num_prompts
        async for piece in pieces:
            self.count(piece)
            texts[piece.index].append(piece.text)
            reasons[piece.index] = piece.finish_reason
        choices = [
            Choice(index=index, text="".join(parts), finish_reason=reason)
            for index, (parts, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return self.encode(choices, self.usage())


class EventStream(StreamingResponse):
    """Server-sent events, one per output token. However it ends, the requests behind it have ended too."""

    def __init__(self, pieces: SideBySide, first: Piece, answer: Answer, include_usage: bool) -> None:
        super().__init__(
            _events(pieces, first, answer, include_usage),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache"},
        )
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. The base class stops when the client goes."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._pieces.cancel()


async def _events(pieces: SideBySide, first: Piece, answer: Answer, include_usage: bool) -> AsyncGenerator[bytes, None]:
    usage: msgspec.UnsetType | None = None if include_usage else msgspec.UNSET
    yield _event(answer.encode([answer.count(first)], usage))
    try:
        async for piece in pieces:
            yield _event(answer.encode([answer.count(piece)], usage))
    except Exception as error:
        told = error_of_engine(error)
        if told is None:
            logger.exception("a completion failed")
            told = ProtocolError(500, "internal error; the server's log has more")
        yield _event(msgspec.json.encode(told.body()))
        return
    if include_usage:
        yield _event(answer.encode([], answer.usage()))
    yield _event(b"[DONE]")


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
