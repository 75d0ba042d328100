"""Requests of OpenAI's protocol: a body becomes one checked record, whichever endpoint it came to."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeAlias, TypeVar, cast

import msgspec

from helixbench.reference_server.http.openai.errors import ProtocolError
from helixbench.reference_server.http.openai.neutral import message_without_neutral, without_neutral
from helixbench.solver.scheduling.work import SamplingParams

DEFAULT_MAX_TOKENS = 16  # OpenAI's, of completions
MAX_STOP_CHARACTERS = 1024

BodyT = TypeVar("BodyT", bound=msgspec.Struct)
NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]

# What msgspec raises on bytes that are no JSON: text that is not UTF-8 and deep nesting have errors of their own.
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``include_usage``: token counts in one more event at the end; ``continuous_usage_stats``: in every event."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Fields of both endpoints.

    ``ignore_eos`` and those from ``top_k`` to ``truncate_prompt_tokens`` are not OpenAI's; their names are vLLM's.
    """

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Positive | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    ignore_eos: bool | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: NotNegative | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, msgspec.Meta(ge=-1)] | None = None


class CompletionBody(_Body, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]
    max_tokens: NotNegative | None = DEFAULT_MAX_TOKENS
    logprobs: int | bool | None = None


class ChatBody(_Body, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /tokenize``: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One message of a conversation; parts of its content are put together as lines."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """Messages that a chat template turns into a text."""

    messages: tuple[dict[str, str], ...]
    add_generation_prompt: bool
    continue_final_message: bool
    template_arguments: dict[str, Any]


Prompt: TypeAlias = str | tuple[int, ...] | Conversation


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for: ``n`` outputs for each prompt.

    ``max_tokens`` is ``None`` for as many as the context has room for, and 0 to score a prompt alone.
    """

    model: str | None
    prompts: tuple[Prompt, ...]
    n: int
    max_tokens: int | None
    min_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    echo: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    skip_special_tokens: bool
    add_special_tokens: bool
    truncate_prompt_tokens: int | None


def parse_completion(raw: bytes) -> Asked:
    """The request in a body of ``/v1/completions``.

    Raises:
        ProtocolError: 400, with the field and what is wrong with it.
    """
    body = parse_body(raw, CompletionBody)
    num_logprobs = int(body.logprobs) if body.logprobs is not None and body.logprobs is not False else None
    return _asked(
        body,
        prompts=_prompts(body.prompt),
        max_tokens=body.max_tokens,
        num_logprobs=num_logprobs,
        adds_special_tokens=True,
    )


def parse_chat(raw: bytes, *, max_messages: int) -> Asked:
    """The request in a body of ``/v1/chat/completions``, with at most this many messages.

    Raises:
        ProtocolError: 400, with the field and what is wrong with it.
    """
    body = parse_body(raw, ChatBody)
    if body.echo:
        raise ProtocolError(400, "echo: only completions have it", param="echo", code="unsupported_parameter")
    if body.top_logprobs and not body.logprobs:
        raise ProtocolError(400, "top_logprobs: only with logprobs = true", param="top_logprobs")
    return _asked(
        body,
        prompts=(conversation_of(body, body.messages, max_messages=max_messages),),
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        adds_special_tokens=False,  # the template writes them
    )


def parse_body(raw: bytes, kind: type[BodyT]) -> BodyT:
    """A body of that kind, its neutral fields left out.

    Raises:
        ProtocolError: 400, with the field and what is wrong with it.
    """
    try:
        decoded = msgspec.json.decode(raw)
    except _NOT_JSON as error:
        raise ProtocolError(400, f"the body is not JSON: {error}") from error
    if not isinstance(decoded, dict):
        raise ProtocolError(400, "the body is not a JSON object")
    return _convert(without_neutral(decoded), kind)


def conversation_of(
    body: ChatBody | TokenizeBody, messages: list[dict[str, Any]], *, max_messages: int
) -> Conversation:
    """The conversation that a body holds.

    Raises:
        ProtocolError: 400, with the message and what is wrong with it.
    """
    if not messages:
        raise ProtocolError(400, "messages: need at least one", param="messages")
    if len(messages) > max_messages:  # each takes a token or more
        message = f"messages: {len(messages)} messages; the context has {max_messages} tokens"
        raise ProtocolError(400, message, param="messages", code="context_length_exceeded")
    continues = bool(body.continue_final_message)
    return Conversation(
        messages=tuple(_message(given, f"messages[{index}]") for index, given in enumerate(messages)),
        add_generation_prompt=not continues if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=continues,
        template_arguments=body.chat_template_kwargs or {},
    )


def _message(given: dict[str, Any], place: str) -> dict[str, str]:
    message = _convert(message_without_neutral(given, place), Message, place=place)
    content = message.content
    if isinstance(content, list):
        content = "\n".join(_text_of(part, f"{place}.content[{index}]") for index, part in enumerate(content))
    named = {} if message.name is None else {"name": message.name}
    return {"role": message.role, "content": content or ""} | named


def _text_of(part: dict[str, Any], place: str) -> str:
    kind, text = part.get("type"), part.get("text")
    if kind != "text" or not isinstance(text, str):
        message = f'{place}: only {{"type": "text", "text": "..."}} is served, got type {str(kind)[:100]!r}'
        raise ProtocolError(400, message, param=place, code="unsupported_parameter")
    return text


def _convert(given: dict[str, Any], kind: type[BodyT], *, place: str = "") -> BodyT:
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        found = re.search(r"`\$\.(\w+)", str(error)) or re.search(r"field `([^`]+)`", str(error))
        field = ".".join(part for part in (place, found[1] if found else "") if part)
        where = f"{place}: " if place else ""
        raise ProtocolError(400, f"{where}{error}", param=field or None) from error


def _asked(
    body: CompletionBody | ChatBody,
    *,
    prompts: tuple[Prompt, ...],
    max_tokens: int | None,
    num_logprobs: int | None,
    adds_special_tokens: bool,
) -> Asked:
    n = body.n or 1
    if body.best_of not in (None, n):
        message = f"best_of: only n ({n}) is served, got {body.best_of}; leave it out"
        raise ProtocolError(400, message, param="best_of", code="unsupported_parameter")
    min_tokens = body.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        message = f"min_tokens: need at most max_tokens ({max_tokens}), got {min_tokens}"
        raise ProtocolError(400, message, param="min_tokens")
    usage = body.stream_options or StreamOptions()
    return Asked(
        model=body.model,
        prompts=prompts,
        n=n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        sampling=_sampling(body, num_logprobs),
        stop=_stop(body.stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        echo=bool(body.echo),
        stream=bool(body.stream),
        include_usage=bool(usage.include_usage),
        continuous_usage=bool(usage.continuous_usage_stats),
        skip_special_tokens=body.skip_special_tokens is not False,
        add_special_tokens=adds_special_tokens if body.add_special_tokens is None else body.add_special_tokens,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
    )


def _sampling(body: _Body, num_logprobs: int | None) -> SamplingParams:
    try:
        return SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            top_k=0 if body.top_k in (None, -1) else body.top_k,
            min_p=0.0 if body.min_p is None else body.min_p,
            num_logprobs=num_logprobs,
        )
    except ValueError as error:
        raise ProtocolError(400, str(error), param=str(error).partition(":")[0]) from error


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise ProtocolError(400, "stop: an empty string would stop at once", param="stop")
    longest = max((len(one) for one in stops), default=0)
    if longest > MAX_STOP_CHARACTERS:
        message = f"stop: need strings of at most {MAX_STOP_CHARACTERS} characters, got one of {longest}"
        raise ProtocolError(400, message, param="stop")
    return stops


def _prompts(prompt: str | list[str | int | list[int]]) -> tuple[str | tuple[int, ...], ...]:
    """A text, texts, the token ids of one prompt, or those of several."""
    if isinstance(prompt, str):
        return (prompt,)
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return (tuple(cast(list[int], prompt)),)
    if kinds == {str}:
        return tuple(cast(list[str], prompt))
    if kinds == {list}:
        return tuple(map(tuple, cast(list[list[int]], prompt)))
    message = "prompt: need a string, strings, token ids or lists of token ids, at least one and all of one kind"
    raise ProtocolError(400, message, param="prompt")
