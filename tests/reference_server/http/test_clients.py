"""Load generators and evaluators that people use: the bodies that they send, and how each reads the answer.

Written anew from what these clients document and do. Each reader gives what its client reports.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import openai
import pytest

from tests.reference_server.http.serving import EOS, MODEL, TEXT, WAIT_S, FakeEngine, ask

NUM_TOKENS = 30  # more than TEXT has: with ignore_eos the output goes on after it
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Report(NamedTuple):
    """What a client reports of one request."""

    is_success: bool
    text: str
    num_tokens: int | None  # by the server's count, where the client reads it
    num_events: int  # that it times, the first for TTFT


def lines_of(url: str, path: str, body: dict[str, Any]) -> Iterator[str]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=WAIT_S)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        yield from (line.strip() for line in answer.read().decode().splitlines())
    finally:
        connection.close()


def vllm_reader(lines: Iterator[str], text_of: Callable[[dict[str, Any]], str | None]) -> Report:
    """Any event with choices is timed; the token count comes from an event without."""
    text, num_tokens, num_events = "", None, 0
    for line in lines:
        if not line or line.startswith(":"):
            continue
        chunk = line.removeprefix("data: ")
        if chunk == "[DONE]":
            continue
        data = json.loads(chunk)
        if choices := data.get("choices"):
            num_events += 1
            text += text_of(choices[0]) or ""
        elif usage := data.get("usage"):
            num_tokens = usage.get("completion_tokens")
    return Report(num_events > 0, text, num_tokens, num_events)


def sglang_reader(lines: Iterator[str], text_of: Callable[[dict[str, Any]], str | None]) -> Report:
    """Only events with text are timed, every event has a choice, and the count comes with any event that has one."""
    text, num_tokens, num_events = "", None, 0
    for line in lines:
        chunk = line.removeprefix("data: ")
        if not chunk or chunk == "[DONE]":
            continue
        data = json.loads(chunk)
        if new := text_of(data["choices"][0]):
            num_events += 1
            text += new
        num_tokens = (data.get("usage") or {}).get("completion_tokens", num_tokens)
    return Report(bool(text), text, num_tokens, num_events)


def guidellm_reader(lines: Iterator[str], text_of: Callable[[dict[str, Any]], str | None]) -> Report:
    """Lines of data up to the end mark; the newest usage counts."""
    text, usage, num_events, is_done = "", None, 0, False
    for line in lines:
        if not line.startswith("data:"):
            continue
        if line == "data: [DONE]":
            is_done = True
            break
        data = json.loads(line.removeprefix("data:").strip())
        usage = data.get("usage") or usage
        for choice in data["choices"][:1]:
            text += text_of(choice) or ""
            num_events += 1
    return Report(is_done, text, usage and usage["completion_tokens"], num_events)


def aiperf_reader(lines: Iterator[str], text_of: Callable[[dict[str, Any]], str | None]) -> Report:
    """Objects are told apart by their name; unknown ones are an error."""
    text, usage, num_events, is_done = "", None, 0, False
    for line in lines:
        field, _, value = line.partition(":")
        if field != "data":
            continue
        if value.strip() == "[DONE]":
            is_done = True
            continue
        data = json.loads(value)
        assert data["object"] in ("text_completion", "chat.completion.chunk")
        usage = data.get("usage") or usage
        if data["choices"]:
            num_events += 1
            text += text_of(data["choices"][0]) or ""
    return Report(is_done, text, usage and usage["completion_tokens"], num_events)


def completion_text(choice: dict[str, Any]) -> str | None:
    text: str | None = choice.get("text")
    return text


def chat_text(choice: dict[str, Any]) -> str | None:
    content: str | None = choice["delta"].get("content")
    return content


PROMPT = "The capital of France is"
PARTS = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
USAGE = {"include_usage": True}
ALL_USAGE = {"include_usage": True, "continuous_usage_stats": True}
# client -> (endpoint, body, reader, whether it asks for token counts)
LOAD_GENERATORS: dict[str, tuple[str, dict[str, Any], Any, bool]] = {
    "vllm bench serve": (
        COMPLETIONS,
        {
            "model": MODEL,
            "prompt": PROMPT,
            "max_tokens": NUM_TOKENS,
            "repetition_penalty": 1.0,
            "logprobs": None,
            "stream": True,
            "stream_options": USAGE,
            "ignore_eos": True,
            "temperature": 0.0,
        },
        vllm_reader,
        True,
    ),
    "vllm bench serve, chat": (
        CHAT,
        {
            "model": MODEL,
            "messages": PARTS,
            "max_completion_tokens": NUM_TOKENS,
            "stream": True,
            "stream_options": USAGE,
            "ignore_eos": True,
            "top_k": -1,
            "min_p": 0.0,
        },
        vllm_reader,
        True,
    ),
    "sglang bench_serving": (
        COMPLETIONS,
        {
            "model": MODEL,
            "prompt": PROMPT,
            "temperature": 0.0,
            "best_of": 1,
            "max_tokens": NUM_TOKENS,
            "stream": True,
            "ignore_eos": True,
        },
        sglang_reader,
        False,
    ),
    "sglang bench_serving, chat": (
        CHAT,
        {
            "model": MODEL,
            "messages": PARTS,
            "temperature": 0.0,
            "max_tokens": NUM_TOKENS,
            "stream": True,
            "ignore_eos": True,
        },
        sglang_reader,
        False,
    ),
    "guidellm": (
        COMPLETIONS,
        {
            "model": MODEL,
            "prompt": PROMPT,
            "max_tokens": NUM_TOKENS,
            "stream": True,
            "stream_options": ALL_USAGE,
            "stop": None,
            "ignore_eos": True,
        },
        guidellm_reader,
        True,
    ),
    "guidellm, chat": (
        CHAT,
        {
            "model": MODEL,
            "messages": PARTS,
            "max_completion_tokens": NUM_TOKENS,
            "max_tokens": NUM_TOKENS,
            "stream": True,
            "stream_options": ALL_USAGE,
            "stop": None,
            "ignore_eos": True,
        },
        guidellm_reader,
        True,
    ),
    "aiperf": (
        CHAT,
        {
            "model": MODEL,
            "messages": [{"role": "user", "name": "", "content": PROMPT}],
            "max_completion_tokens": NUM_TOKENS,
            "stream": True,
            "stream_options": USAGE,
            "min_tokens": NUM_TOKENS,
            "ignore_eos": True,
        },
        aiperf_reader,
        True,
    ),
    "aiperf, completions": (
        COMPLETIONS,
        {
            "model": MODEL,
            "prompt": [PROMPT],
            "max_tokens": NUM_TOKENS,
            "stream": True,
            "stream_options": USAGE,
            "min_tokens": NUM_TOKENS,
            "ignore_eos": True,
        },
        aiperf_reader,
        True,
    ),
    "genai-perf": (
        COMPLETIONS,
        {
            "model": MODEL,
            "prompt": PROMPT,
            "max_tokens": NUM_TOKENS,
            "stream": True,
            "min_tokens": NUM_TOKENS,
            "ignore_eos": True,
        },
        aiperf_reader,
        False,
    ),
}


@pytest.mark.parametrize("client", LOAD_GENERATORS)
def test_load_generators_count_every_token(url: str, engine: FakeEngine, client: str) -> None:
    path, body, reader, asks_for_usage = LOAD_GENERATORS[client]
    is_chat = path == CHAT

    report = reader(lines_of(url, path, body), chat_text if is_chat else completion_text)

    expected = TEXT + (TEXT.encode() * 2)[: NUM_TOKENS - len(TEXT.encode()) - 1].decode(errors="ignore")
    assert report.is_success
    assert report.text == expected + "\N{REPLACEMENT CHARACTER}" * (not expected.endswith("日"))
    assert report.num_tokens == (NUM_TOKENS if asks_for_usage else None)
    assert report.num_events == NUM_TOKENS or reader is sglang_reader
    assert engine.calls[0].max_tokens == NUM_TOKENS


@pytest.mark.parametrize("client", [name for name, parts in LOAD_GENERATORS.items() if parts[0] == COMPLETIONS])
def test_load_generators_see_an_error_as_one(url: str, engine: FakeEngine, client: str) -> None:
    """The body breaks off under the reader: never an end in order."""
    path, body, reader, _ = LOAD_GENERATORS[client]
    with pytest.raises(http.client.IncompleteRead):
        reader(lines_of(url, path, body | {"prompt": "die"}), completion_text)


def test_guidellm_and_aiperf_find_the_model_and_the_servers_health(url: str) -> None:
    assert ask(url, "GET", "/health").status == 200
    assert ask(url, "GET", "/v1/models").json["data"][0]["id"] == MODEL


def lm_eval_loglikelihood(answer: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """Log probability of each continuation, and whether it is the greedy one; the generated token is left out."""
    results = []
    for choice, context in zip(sorted(answer["choices"], key=lambda one: one["index"]), context_lengths, strict=True):
        token_logprobs = choice["logprobs"]["token_logprobs"][context:-1]
        top_logprobs = choice["logprobs"]["top_logprobs"][context:-1]
        is_greedy = all(logprob == max(top.values()) for logprob, top in zip(token_logprobs, top_logprobs, strict=True))
        results.append((sum(token_logprobs), is_greedy))
    return results


@pytest.mark.parametrize("seed", [1234, None])
def test_lm_eval_scores_continuations(url: str, engine: FakeEngine, seed: int | None) -> None:
    """``local-completions``: token ids of context and continuation, echoed with their scores."""
    body = {
        "model": MODEL,
        "prompt": [[10, 20, 30, 40], [11, 21]],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": seed,
        "echo": True,
    }
    answer = ask(url, "POST", COMPLETIONS, json.dumps(body).encode()).json
    # The fake engine's scores are the ids with a minus, and one id less is likelier.
    assert lm_eval_loglikelihood(answer, [2, 1]) == [(-70.0, False), (-21.0, False)]


def test_lm_eval_generates(url: str, engine: FakeEngine) -> None:
    body = {
        "model": MODEL,
        "prompt": [PROMPT, "x"],
        "max_tokens": 256 - 100,
        "temperature": 0,
        "stop": ["\n\n", "本"],
        "seed": 1234,
    }
    answer = ask(url, "POST", COMPLETIONS, json.dumps(body).encode()).json
    assert [choice["text"] for choice in answer["choices"]] == ["héllo 日"] * 2


def test_the_official_client_with_all_that_it_sends(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        temperature=0,
        top_p=1,
        n=2,
        presence_penalty=0,
        frequency_penalty=0,
        logit_bias={},
        user="me",
        metadata={"a": "b"},
        store=False,
        parallel_tool_calls=True,
        response_format={"type": "text"},
        service_tier="auto",
        stop=["zzz"],
        seed=1,
    )
    assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
    assert engine.calls[0].stop_token_ids == frozenset({EOS})
    events = client.completions.create(
        model=MODEL,
        prompt="hi",
        max_tokens=100,
        stream=True,
        stream_options={"include_usage": True},
        best_of=1,
        echo=True,
    )
    assert "".join(event.choices[0].text for event in events if event.choices) == "hi" + TEXT
