"""OpenAI-compatible HTTP in front of an engine: completions, also streaming, models, health and metrics."""

from __future__ import annotations

import time
from typing import Any, Protocol

import msgspec
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from helixbench.reference_server.http.answer import Answer, EventStream
from helixbench.reference_server.http.completion import Prompt, SideBySide, complete
from helixbench.reference_server.http.connection import ClientGone, read_body, unless_gone
from helixbench.reference_server.http.engine_protocol import EngineLike
from helixbench.reference_server.http.metrics import Metrics
from helixbench.reference_server.http.protocol import CompletionRequest, ProtocolError, error_of_engine, parse_request

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it


class TokenizerLike(Protocol):
    """What is used of transformers' tokenizers."""

    eos_token_id: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the model expects around a text."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
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
    app.add_exception_handler(ClientGone, _answer_nobody)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
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
        asked = parse_request(await read_body(request))
        self._require_model(asked.model)
        health = self._engine.health()
        if not health.is_ready:
            raise ProtocolError(503, f"the cluster is down: {health.detail or 'no reason known'}", code="unavailable")
        prompts = [self._prompt(index, given, asked) for index, given in enumerate(asked.prompts)]
        decode = self._decode
        pieces = SideBySide(complete(self._engine, prompt, decode=decode, metrics=self._metrics) for prompt in prompts)
        answer = Answer(self._model_name, sum(len(prompt.tokens) for prompt in prompts))
        try:
            if asked.stream:
                # An error is a status, not an event, as long as no token has gone out.
                first = await unless_gone(request, anext(pieces))
                return EventStream(pieces, first, answer, asked.include_usage)
            body = await unless_gone(request, answer.collect(pieces, len(prompts)))
        except BaseException as error:
            await pieces.aclose()
            told = error_of_engine(error)
            if told is None:
                raise
            raise told from error
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
        # Cleaning up takes spaces back that were there a token ago, which a stream cannot.
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

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


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = ProtocolError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    if not isinstance(error, ProtocolError):
        error = ProtocolError(500, "internal error; the server's log has more")
    return _json(error.body(), error.status)


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")
