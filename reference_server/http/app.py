"""The HTTP application: OpenAI's completions and chat, tokenising, models, health and metrics in front of an engine."""

from __future__ import annotations

import functools
import hmac
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from helixbench.reference_server.http.client import BodyBudget, ClientGone, EventStream, unless_gone
from helixbench.reference_server.http.detokenizer import StopStrings
from helixbench.reference_server.http.engine_protocol import (
    EngineLike,
    EngineUnavailable,
    RequestFailed,
    RequestRefused,
)
from helixbench.reference_server.http.generation import Output, SideBySide, generate
from helixbench.reference_server.http.metrics import Metrics
from helixbench.reference_server.http.openai.answers import Answer, AnswerOptions, ChatAnswer, CompletionAnswer
from helixbench.reference_server.http.openai.errors import ProtocolError
from helixbench.reference_server.http.openai.requests import (
    Asked,
    DetokenizeBody,
    TokenizeBody,
    conversation_of,
    parse_body,
    parse_chat,
    parse_completion,
)
from helixbench.reference_server.http.options import HttpOptions
from helixbench.reference_server.http.text import Text
from helixbench.solver.scheduling.requests import Request as EngineRequest
from helixbench.solver.scheduling.work import MAX_SEED, SamplingParams

ParsedT = TypeVar("ParsedT")
Endpoint = Callable[[Request], Awaitable[Response]]

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it
PROTECTED = ("/v1/", "/tokenize", "/detokenize", "/cluster/")  # by API keys; the rest tells nothing that a client sent


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """The model behind an engine.

    Attributes:
        names: that clients may ask for; the first one is reported.
        max_tokens: prompt and output tokens of a request at most.
        vocab_size: token ids that the model has rows for.
        eos_token_ids: tokens that end an output.
        is_hash_model: whether it has no tokenizer and no logits: token ids in and out, greedy decoding alone.
    """

    names: tuple[str, ...]
    max_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    is_hash_model: bool = False


def make_app(engine: EngineLike, *, text: Text, model: ServedModel, options: HttpOptions) -> Starlette:
    """The HTTP application."""
    front = _Front(engine, text, model, options)
    routes = [
        _route("/v1/completions", front.completions, "POST"),
        _route("/v1/chat/completions", front.chat, "POST"),
        _route("/v1/models", front.models, "GET"),
        _route("/v1/models/{name:path}", front.model_card, "GET"),
        _route("/tokenize", front.tokenize, "POST"),
        _route("/detokenize", front.detokenize, "POST"),
        _route("/health", front.health, "GET"),
        _route("/ready", front.health, "GET"),
        _route("/ping", front.health, "GET", "POST"),
        _route("/live", front.live, "GET"),
        _route("/version", front.version, "GET"),
        _route("/cluster/drain/{node}", front.drain, "POST"),
        _route("/metrics", front.prometheus, "GET"),
    ]
    middleware = [Middleware(KeyCheck, keys=options.api_keys)] if options.api_keys else []
    if options.cors_origins:  # the outermost: a browser reads errors, too, only with its headers
        cors = Middleware(CORSMiddleware, allow_origins=options.cors_origins, allow_methods=["*"], allow_headers=["*"])
        middleware.insert(0, cors)
    handlers: dict[Any, Any] = dict.fromkeys((ProtocolError, HTTPException, Exception), _answer_error)
    handlers |= dict.fromkeys((ClientGone, ClientDisconnect), _answer_nobody)
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


class _Front:
    """The answers to the routes."""

    def __init__(self, engine: EngineLike, text: Text, model: ServedModel, options: HttpOptions) -> None:
        self._engine = engine
        self._text = text
        self._model = model
        self._options = options
        self._metrics = Metrics(engine.load, engine.health, model.names[0])
        self._bodies = BodyBudget(options.max_body_bytes)
        self._numbers = itertools.count()
        self._seeds = random.SystemRandom()  # of requests that name none
        self._num_preparing = 0  # outputs accepted whose prompts are being tokenised
        self._started_s = int(time.time())

    async def health(self, _request: Request) -> Response:
        """200 where requests are served, 503 and why where not."""
        health = self._engine.health()
        body = {"status": "ready" if health.is_ready else "down", **msgspec.structs.asdict(health)}
        del body["is_ready"]
        return _json(body, 200 if health.is_ready else 503)

    async def live(self, _request: Request) -> Response:
        """The process answers, whatever the cluster does."""
        return _json({"status": "live"})

    async def drain(self, request: Request) -> Response:
        """A node takes no new requests from now on; where no key is required, only clients of this machine may ask."""
        host = request.client.host if request.client is not None else ""
        if not self._options.api_keys and host not in ("127.0.0.1", "::1"):
            message = "nodes are drained by clients on this machine, or with an API key (serve --api-key)"
            raise ProtocolError(403, message, code="forbidden")
        node = request.path_params["node"]
        known = self._engine.health().nodes
        if node not in known:
            raise ProtocolError(404, f"there is no node {node}; there are {', '.join(known)}", code="unknown_node")
        self._engine.drain(node)
        return _json({"node": node, "state": "draining"}, 202)

    async def version(self, _request: Request) -> Response:
        """Version of this server."""
        return _json({"version": metadata.version("helixbench")})

    async def models(self, _request: Request) -> Response:
        """The model, under each of its names."""
        return _json({"object": "list", "data": [self._card(name) for name in self._model.names]})

    async def model_card(self, request: Request) -> Response:
        """The model of that name."""
        name = request.path_params["name"]
        self._require_model(name)
        return _json(self._card(name))

    async def prometheus(self, _request: Request) -> Response:
        """Metrics since the start."""
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text or of a conversation; vLLM's endpoint."""
        async with self._bodies.read(request) as raw:
            body = await self._text.aside(functools.partial(parse_body, raw, TokenizeBody), len(raw))
        self._require_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ProtocolError(400, "need prompt or messages, one of them", param="prompt")
        prompt = (
            body.prompt
            if body.messages is None
            else conversation_of(body, body.messages, max_messages=self._model.max_tokens)
        )
        adds = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
        (tokens,) = await self._text.encode([prompt or ""], add_special_tokens=adds)
        strings = [self._text.token_text(token) for token in tokens] if body.return_token_strs else None
        return _json(
            {"count": len(tokens), "max_model_len": self._model.max_tokens, "tokens": tokens, "token_strs": strings}
        )

    async def detokenize(self, request: Request) -> Response:
        """Text of token ids; vLLM's endpoint."""
        async with self._bodies.read(request) as raw:
            body = await self._text.aside(functools.partial(parse_body, raw, DetokenizeBody), len(raw))
        self._require_model(body.model)
        self._require_tokens("tokens", body.tokens)
        decode = functools.partial(self._text.decode, body.tokens, skip_special_tokens=False)
        return _json({"prompt": await self._text.aside(decode, len(body.tokens))})

    async def completions(self, request: Request) -> Response:
        """OpenAI's text completions."""
        return await self._answer(request, parse_completion, CompletionAnswer)

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completions."""
        parse = functools.partial(parse_chat, max_messages=self._model.max_tokens)
        return await self._answer(request, parse, ChatAnswer)

    async def _answer(
        self, request: Request, parse: Callable[[bytes], Asked], kind: Callable[[AnswerOptions], Answer]
    ) -> Response:
        async with self._bodies.read(request) as raw:
            asked = await self._text.aside(functools.partial(parse, raw), len(raw))
        self._require_model(asked.model)
        self._require_served(asked)
        health = self._engine.health()
        if not health.is_ready:
            raise ProtocolError(503, f"the cluster is down: {health.detail or 'no reason known'}", code="unavailable")
        with self._place_for(len(asked.prompts) * asked.n):
            prompts = await unless_gone(request.receive, self._prompts(asked))
            self._require_room(sum(map(len, prompts)) * asked.n)
            outputs = self._outputs(asked, prompts)
            client = object()  # each body takes its turn
            pieces = SideBySide(
                generate(self._engine, output, client=client, text=self._text, metrics=self._metrics)
                for output in outputs
            )
        decode = functools.partial(self._text.decode, skip_special_tokens=asked.skip_special_tokens)
        answer = kind(
            AnswerOptions(
                model_name=asked.model or self._model.names[0],
                prompts=tuple(prompts),
                echo=tuple(decode(prompt) for prompt in prompts) if asked.echo else (),
                n=asked.n,
                num_logprobs=asked.sampling.num_logprobs,
                include_usage=asked.include_usage,
                continuous_usage=asked.continuous_usage,
                token_text=self._text.token_text,
            )
        )
        try:
            if asked.stream:
                # An error is a status, not an event, as long as no token has gone out.
                first = await unless_gone(request.receive, anext(pieces))
                return EventStream(pieces, first, answer, error_of_engine)
            body = await unless_gone(request.receive, answer.whole(pieces))
        except BaseException as error:
            await pieces.aclose()
            told = error_of_engine(error)
            if told is None:
                raise
            raise told from error
        return Response(body, media_type="application/json")

    @contextmanager
    def _place_for(self, num_outputs: int) -> Iterator[None]:
        """Count outputs as waiting while their prompts are being tokenised.

        Raises:
            ProtocolError: 429, too many wait.
        """
        num_waiting = self._engine.load().num_waiting + self._num_preparing
        if num_waiting + num_outputs > self._options.max_waiting:
            raise ProtocolError(429, f"{num_waiting} requests wait already; try again later", code="too_many_requests")
        self._num_preparing += num_outputs
        try:
            yield
        finally:
            self._num_preparing -= num_outputs

    def _require_room(self, num_tokens: int) -> None:
        waiting = self._engine.load().waiting_tokens
        if waiting and waiting + num_tokens > self._options.max_waiting_tokens:
            raise ProtocolError(429, f"{waiting} prompt tokens wait already; try again later", code="too_many_requests")

    async def _prompts(self, asked: Asked) -> list[tuple[int, ...]]:
        """Token ids of the prompts, each one possible."""
        prompts = await self._text.encode(asked.prompts, add_special_tokens=asked.add_special_tokens)
        if asked.truncate_prompt_tokens is not None:
            room = self._model.max_tokens - (asked.max_tokens or 1)
            kept = room if asked.truncate_prompt_tokens == -1 else asked.truncate_prompt_tokens
            prompts = [prompt[max(0, len(prompt) - kept) :] for prompt in prompts]
        for prompt in prompts:
            if not prompt:
                raise ProtocolError(400, "prompt: need at least one token", param="prompt")
            max_tokens = asked.max_tokens or 1
            if len(prompt) + max_tokens > self._model.max_tokens:
                raise ProtocolError(
                    400,
                    f"prompt of {len(prompt)} and max_tokens of {max_tokens} are {len(prompt) + max_tokens} tokens; "
                    f"this server takes {self._model.max_tokens} at most",
                    param="max_tokens",
                    code="context_length_exceeded",
                )
            self._require_tokens("prompt", prompt)
        return prompts

    def _outputs(self, asked: Asked, prompts: list[tuple[int, ...]]) -> list[Output]:
        stop = StopStrings(asked.stop)
        eos = frozenset() if asked.ignore_eos else self._model.eos_token_ids
        outputs = []
        for choice, (prompt, copy) in enumerate(itertools.product(prompts, range(asked.n))):
            rest = self._model.max_tokens - len(prompt)
            request = EngineRequest(
                number=next(self._numbers),
                prompt=prompt,
                max_tokens=rest if asked.max_tokens is None else max(asked.max_tokens, 1),
                sampling=self._sampling(asked.sampling, copy),
                stop_token_ids=eos | frozenset(asked.stop_token_ids),
                min_tokens=asked.min_tokens,
                is_prompt_scored=asked.echo and asked.sampling.num_logprobs is not None,
            )
            outputs.append(
                Output(
                    choice=choice,
                    request=request,
                    stop=stop,
                    skip_special_tokens=asked.skip_special_tokens,
                    is_empty=asked.max_tokens == 0,
                )
            )
        return outputs

    def _sampling(self, sampling: SamplingParams, copy: int) -> SamplingParams:
        """Sampling parameters of the copy with that number: each of ``n`` outputs draws with a seed of its own."""
        if sampling.temperature == 0:
            return sampling
        if sampling.seed is None:
            return msgspec.structs.replace(sampling, seed=self._seeds.randint(0, MAX_SEED))
        seed = sampling.seed + copy
        return msgspec.structs.replace(sampling, seed=seed if seed <= MAX_SEED else seed - 2**64)

    def _require_model(self, name: str | None) -> None:
        if name is not None and name not in self._model.names:
            message = f"model {name!r} is not served here; {self._model.names[0]!r} is"
            raise ProtocolError(404, message, param="model", code="model_not_found")

    def _require_served(self, asked: Asked) -> None:
        options = self._options
        if len(asked.prompts) * asked.n > options.max_prompts:
            message = f"prompt: {len(asked.prompts)} prompts with n = {asked.n}; at most {options.max_prompts} outputs"
            raise ProtocolError(400, message, param="prompt")
        for field, values in (("stop", asked.stop), ("stop_token_ids", asked.stop_token_ids)):
            if len(values) > options.max_stops:
                raise ProtocolError(400, f"{field}: {len(values)} given; at most {options.max_stops}", param=field)
        self._require_tokens("stop_token_ids", asked.stop_token_ids)
        if self._model.is_hash_model:
            _require_possible_for_hash_model(asked)

    def _require_tokens(self, field: str, tokens: tuple[int, ...] | list[int]) -> None:
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._model.vocab_size:
            odd = min(tokens) if min(tokens) < 0 else max(tokens)
            message = f"{field}: need token ids 0 to {self._model.vocab_size - 1}, got {odd}"
            raise ProtocolError(400, message, param=field)

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "helixbench",
            "root": self._model.names[0],
            "parent": None,
            "max_model_len": self._model.max_tokens,
        }


def _require_possible_for_hash_model(asked: Asked) -> None:
    """Refuse what takes a tokenizer or logits.

    Raises:
        ProtocolError: 400, with the field.
    """
    sampling = asked.sampling
    wrong = {
        "prompt": (any(not isinstance(one, tuple) for one in asked.prompts), "has no tokenizer; send token ids"),
        "temperature": (sampling.temperature > 0, "decodes greedily; send temperature 0"),
        "logprobs": (sampling.num_logprobs is not None, "has no log probabilities; leave it out"),
        "min_tokens": (asked.min_tokens > 0, "cannot pass over stop tokens; leave it out"),
    }
    for field, (is_wrong, why) in wrong.items():
        if is_wrong:
            message = f"{field}: this model is a hash model, which {why}"
            raise ProtocolError(400, message, param=field, code="unsupported_parameter")


class KeyCheck:
    """Lets requests through that bring an API key; what needs none is health, metrics and the version."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it through, or answer 401."""
        if scope["type"] == "http" and scope["path"].startswith(PROTECTED) and not self._has_key(scope):
            error = ProtocolError(401, "need an API key: Authorization: Bearer KEY", code="invalid_api_key")
            await _error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        if scope["method"] == "OPTIONS":  # a browser asks without the key what it may send
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # All keys are compared, each in constant time, so that the time tells nothing of how near a guess is.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return bool(scheme.lower() == b"bearer" and any(matches))


def error_of_engine(error: BaseException) -> ProtocolError | None:
    """The answer to an error that an engine raises on purpose; ``None`` for any other, which is a bug."""
    if isinstance(error, RequestRefused):
        return ProtocolError(400, str(error), code="request_refused")
    if isinstance(error, RequestFailed):
        return ProtocolError(500, str(error), code="request_failed")
    if isinstance(error, EngineUnavailable):
        return ProtocolError(503, str(error), code="unavailable")
    return None


def _route(path: str, endpoint: Endpoint, *methods: str) -> Route:
    allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])

    async def answer(request: Request) -> Response:
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": allowed})
        return await endpoint(request)

    return Route(path, answer, methods=[*methods, "OPTIONS"])


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}"
        answer = _error_response(ProtocolError(error.status_code, message))
        answer.headers.update(error.headers or {})
        return answer
    if not isinstance(error, ProtocolError):
        error = ProtocolError(500, "internal error; the server's log has more")
    return _error_response(error)


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _error_response(error: ProtocolError) -> Response:
    answer = _json(error.body(), error.status)
    answer.headers.update(error.headers)
    return answer


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")
