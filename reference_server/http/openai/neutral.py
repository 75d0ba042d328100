"""Fields that are accepted only where they change nothing: at their neutral values, or whatever they are.

Clients send many fields at their defaults. What cannot change an output is never a reason to refuse a request, and what
would change it is refused by name.
"""

from __future__ import annotations

from typing import Any

from helixbench.reference_server.http.openai.errors import ProtocolError

# field -> the values that change nothing; null, which says nothing, is one of them for every field
NEUTRAL: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "custom_logit_processor": (),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "ebnf": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "lora_path": (),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "no_stop_trim": (False,),
    "presence_penalty": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "regex": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_hidden_states": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

# They concern accounting, caching and order, never the tokens of an output.
UNUSED: frozenset[str] = frozenset(
    {
        "cache_salt",
        "include_reasoning",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "priority",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "rid",
        "safety_identifier",
        "separate_reasoning",
        "service_tier",
        "store",
        "stream_reasoning",
        "user",
    }
)

# Members of a chat message that say nothing where they are empty.
MESSAGE_NEUTRAL: dict[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "refusal": ("",),
    "tool_call_id": ("",),
    "tool_calls": ([],),
}


def without_neutral(body: dict[str, Any]) -> dict[str, Any]:
    """The body without the fields that change nothing.

    Raises:
        ProtocolError: 400, one of them has another value.
    """
    return _without(body, NEUTRAL, place="", unused=UNUSED)


def message_without_neutral(message: dict[str, Any], place: str) -> dict[str, Any]:
    """The chat message at ``place`` without the members that say nothing; raises as ``without_neutral``."""
    return _without(message, MESSAGE_NEUTRAL, place=f"{place}.")


def _without(
    given: dict[str, Any],
    neutral: dict[str, tuple[object, ...]],
    *,
    place: str,
    unused: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    left = {}
    for field, value in given.items():
        if field in unused:
            continue
        if field not in neutral:
            left[field] = value
        elif value is not None and not any(_same(_plain(field, value), one) for one in neutral[field]):
            only = " or ".join(repr(one) for one in neutral[field]) or "null"
            message = f"{place}{field}: only {only} is served, got {str(value)[:100]!r}; leave it out"
            raise ProtocolError(400, message, param=f"{place}{field}", code="unsupported_parameter")
    return left


def _plain(field: str, value: Any) -> Any:
    """A bias of 0 is none."""
    if field == "logit_bias" and isinstance(value, dict):
        return {token: bias for token, bias in value.items() if bias != 0}
    return value


def _same(value: Any, neutral: object) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
