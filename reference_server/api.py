"""OpenAI-compatible HTTP in front of an engine: completions, also streaming, models, health and metrics."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Send

from .completion import Piece, Prompt, SideBySide, complete
from .engine_types import EngineLike, EngineUnavailable, RequestRefused
from .metrics import Metrics
from .openai_protocol import Choice, Completion, CompletionRequest, ProtocolError, Usage, parse_request

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")

MAX_BODY_BYTES = 32 * 2**20
CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it


class TokenizerLike(Protocol):
    """What is used of transformers' tokenizers."""

    eos_token_id: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the model expects around a text."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids."""
        ...

    def __len__(self) -> int: ...


def make_app(
    engine: EngineLike,
    *,
    tokenizer: TokenizerLike,
    model_name: str,
    max_model_len: int,
    vocab_size: int | None = None,
    eos_token_ids: frozenset[int] | None = None,
) -> FastAPI:
    """The HTTP application.

    Args:
        engine: what generates.
        tokenizer: of the model.
        model_name: the name that clients ask for.
        max_model_len: prompt and output tokens of a request at most.
        vocab_size: token ids that the model has rows for; the tokenizer's by default.
        eos_token_ids: tokens that end an output; the tokenizer's one by default.
    """
    if eos_token_ids is None:
        eos_token_ids = frozenset(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
    front = _Front(
        engine=engine,
        tokenizer=tokenizer,
        model_name=model_name,
        max_model_len=max_model_len,
        vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
        eos_token_ids=eos_token_ids,
    )
    app = FastAPI(title="helixbench", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/v1/completions", front.completions, methods=["POST"])
    app.add_api_route("/v1/models", front.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", front.model, methods=["GET"])
    app.add_api_route("/health", front.health, methods=["GET"])
    app.add_api_route("/metrics", front.prometheus, methods=["GET"])
    app.add_exception_handler(ProtocolError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(Exception, _answer_error)
    return app


class _Front:
    """The answers to the routes."""

    def __init__(
        self,
        *,
        engine: EngineLike,
        tokenizer: TokenizerLike,
        model_name: str,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._metrics = Metrics()
        self._started_s = int(time.time())

    async def health(self) -> Response:
        """200 where requests are served, 503 and why where not."""
        health = self._engine.health()
        body = {"status": "ready" if health.is_ready else "down", "detail": health.detail, "nodes": health.nodes}
        return _json(body, 200 if health.is_ready else 503)

    async def models(self) -> Response:
        """The one model."""
        return _json({"object": "list", "data": [self._model_card()]})

    async def model(self, name: str) -> Response:
        """The model of that name."""
        self._require_model(name)
        return _json(self._model_card())

    async def prometheus(self) -> Response:
        """Counters since the start."""
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def completions(self, request: Request) -> Response:
        """OpenAI's text completions."""
        asked = parse_request(await _read_body(request))
        self._require_model(asked.model)
        health = self._engine.health()
        if not health.is_ready:
            raise ProtocolError(503, f"the cluster is down: {health.detail or 'no reason known'}", code="unavailable")
        prompts = [self._prompt(index, given, asked) for index, given in enumerate(asked.prompts)]
        decode = self._decode
        pieces = SideBySide(complete(self._engine, prompt, decode=decode, metrics=self._metrics) for prompt in prompts)
        answer = _Answer(self._model_name, sum(len(prompt.tokens) for prompt in prompts))
        try:
            if asked.stream:
                # An error is a status, not an event, as long as no token has gone out.
                first = await _unless_gone(request, anext(pieces))
                return _EventStream(pieces, first, answer, asked.include_usage)
            body = await _unless_gone(request, answer.collect(pieces, len(prompts)))
        except BaseException as error:
            await pieces.aclose()
            if isinstance(error, _ClientGone):
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            raise _protocol_error(error) or error from error
        return Response(body, media_type="application/json")

    def _prompt(self, index: int, given: str | tuple[int, ...], asked: CompletionRequest) -> Prompt:
        tokens = tuple(self._tokenizer.encode(given)) if isinstance(given, str) else given
        if not tokens:
            raise ProtocolError(400, "prompt: need at least one token", param="prompt")
        for token in tokens:
            if not 0 <= token < self._vocab_size:
                raise ProtocolError(
                    400, f"prompt: need token ids 0 to {self._vocab_size - 1}, got {token}", param="prompt"
                )
        if len(tokens) + asked.max_tokens > self._max_model_len:
            raise ProtocolError(
                400,
                f"prompt of {len(tokens)} and max_tokens of {asked.max_tokens} are {len(tokens) + asked.max_tokens} "
                f"tokens; this server takes {self._max_model_len} at most",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return Prompt(
            index=index,
            tokens=tokens,
            max_tokens=asked.max_tokens,
            sampling=asked.sampling,
            stop=asked.stop,
            stop_token_ids=frozenset() if asked.ignore_eos else self._eos_token_ids,
        )

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _require_model(self, name: str) -> None:
        if name != self._model_name:
            message = f"model {name!r} is not served here; {self._model_name!r} is"
            raise ProtocolError(404, message, param="model", code="model_not_found")

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._model_name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "helixbench",
            "max_model_len": self._max_model_len,
        }


class _Answer:
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

    def encode(self, choices: Sequence[Choice], usage: Usage | None | msgspec.UnsetType = msgspec.UNSET) -> bytes:
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


class _EventStream(StreamingResponse):
    """Server-sent events, one per output token. However it ends, the requests behind it have ended too."""

    def __init__(self, pieces: SideBySide, first: Piece, answer: _Answer, include_usage: bool) -> None:
        super().__init__(
            _events(pieces, first, answer, include_usage),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache"},
        )
        self._pieces = pieces

    async def stream_response(self, send: Send) -> None:
        """Also called off by the base class when the client goes."""
        try:
            await super().stream_response(send)
        finally:
            self._pieces.cancel()


async def _events(
    pieces: SideBySide, first: Piece, answer: _Answer, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    usage: None | msgspec.UnsetType = None if include_usage else msgspec.UNSET
    yield _event(answer.encode([answer.count(first)], usage))
    try:
        async for piece in pieces:
            yield _event(answer.encode([answer.count(piece)], usage))
    except Exception as error:
        told = _protocol_error(error)
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


class _ClientGone(Exception):  # noqa: N818 - not an error
    """The client closed its connection."""


async def _unless_gone(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of ``work``, which is cancelled when the client closes its connection.

    Raises:
        _ClientGone: it did.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_leaves(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _read_body(request: Request) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > MAX_BODY_BYTES:
            raise ProtocolError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _protocol_error(error: BaseException) -> ProtocolError | None:
    """The answer to an error that the engine raises on purpose."""
    if isinstance(error, RequestRefused):
        return ProtocolError(400, str(error), code="request_refused")
    if isinstance(error, EngineUnavailable):
        return ProtocolError(503, str(error), code="unavailable")
    return None


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = ProtocolError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    if not isinstance(error, ProtocolError):
        error = ProtocolError(500, "internal error; the server's log has more")
    return _json(error.body(), error.status)


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")
