"""The part of OpenAI's completions protocol that is served: requests become one checked record, the rest an error."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from helixbench.reference_server.http.engine_protocol import EngineUnavailable, RequestRefused
from helixbench.solver.scheduling.work import SamplingParams

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class ProtocolError(Exception):
    """An answer in OpenAI's error format."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def error_of_engine(error: BaseException) -> ProtocolError | None:
    """The answer to an error that an engine raises on purpose; ``None`` for any other, which is a bug."""
    if isinstance(error, RequestRefused):
        return ProtocolError(400, str(error), code="request_refused")
    if isinstance(error, EngineUnavailable):
        return ProtocolError(503, str(error), code="unavailable")
    return None


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``include_usage``: one more event at the end, with the token counts and no choice."""

    include_usage: bool = False


class CompletionBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/completions`` as it comes. Fields that are not served are here so that errors name them.

    ``ignore_eos`` is this server's (and vLLM's) own: generate ``max_tokens`` tokens whatever they are.
    """

    model: str
    prompt: str | list[str | int | list[int]]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: str | None = None
    n: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class CompletionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for: each prompt a text or token ids, one choice each."""

    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    max_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    ignore_eos: bool


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The text of one prompt's completion, or the next part of it."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """An answer, or one event of a streamed one."""

    id: str
    created: int
    model: str
    choices: tuple[Choice, ...]
    object: str = "text_completion"
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


def parse_request(raw: bytes) -> CompletionRequest:
    """The request in a body.

    Raises:
        ProtocolError: 400, with the field and what is wrong with it.
    """
    try:
        body = msgspec.json.decode(raw, type=CompletionBody)
    except msgspec.ValidationError as error:
        field = re.search(r"`\$\.(\w+)", str(error)) or re.search(r"field `(\w+)`", str(error))
        raise ProtocolError(400, str(error), param=field[1] if field else None) from error
    except msgspec.DecodeError as error:
        raise ProtocolError(400, f"the body is not JSON: {error}") from error
    _refuse_unserved(body)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens < 1:
        raise ProtocolError(400, f"max_tokens: need at least 1, got {max_tokens}", param="max_tokens")
    if body.stream_options is not None and not body.stream:
        raise ProtocolError(400, "stream_options: only with stream = true", param="stream_options")
    return CompletionRequest(
        model=body.model,
        prompts=_prompts(body.prompt),
        max_tokens=max_tokens,
        sampling=_sampling(body),
        stop=_stop(body.stop),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        ignore_eos=body.ignore_eos,
    )


def _refuse_unserved(body: CompletionBody) -> None:
    served: dict[str, tuple[object, ...]] = {
        "n": (None, 1),
        "best_of": (None, 1),
        "echo": (None, False),
        "suffix": (None, ""),
        "logprobs": (None,),
        "logit_bias": (None, {}),
        "presence_penalty": (None, 0),
        "frequency_penalty": (None, 0),
    }
    for field, values in served.items():
        value = getattr(body, field)
        if value not in values:
            message = f"{field}: this server has no {field} other than {values[-1]!r}, got {value!r}; leave it out"
            raise ProtocolError(400, message, param=field, code="unsupported_parameter")


def _sampling(body: CompletionBody) -> SamplingParams:
    try:
        return SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
        )
    except ValueError as error:
        raise ProtocolError(400, str(error), param=str(error).partition(":")[0]) from error


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise ProtocolError(400, "stop: an empty string would stop at once", param="stop")
    return stops


def _prompts(prompt: str | list[str | int | list[int]]) -> tuple[str | tuple[int, ...], ...]:
    """One prompt per choice: a text, texts, one list of token ids, or several."""
    if isinstance(prompt, str):
        return (prompt,)
    texts = tuple(item for item in prompt if isinstance(item, str))
    tokens = tuple(item for item in prompt if isinstance(item, int))
    token_lists = tuple(tuple(item) for item in prompt if isinstance(item, list))
    if not prompt or len(prompt) not in (len(texts), len(tokens), len(token_lists)):
        message = "prompt: need a string, strings, token ids or lists of token ids, at least one and all of one kind"
        raise ProtocolError(400, message, param="prompt")
    return texts or ((tokens,) if tokens else token_lists)
