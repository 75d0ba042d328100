"""``/v1/completions`` behind the real server, an engine aside that makes its tokens up."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from helixbench.reference_server.http.openai.neutral import NEUTRAL, UNUSED
from helixbench.solver.scheduling.work import SamplingParams
from tests.reference_server.http.serving import (
    EOS,
    MAX_LEN,
    MODEL,
    TEXT,
    FakeEngine,
    ask,
    events_of,
    metric,
    post,
    until,
)


def test_a_completion_ends_at_eos(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model=MODEL, prompt="hi", max_tokens=100, temperature=0)

    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, len(TEXT.encode()) + 1)
    (call,) = engine.calls
    assert (call.prompt, call.max_tokens, call.sampling) == ((104, 105), 100, SamplingParams())
    assert call.stop_token_ids == frozenset({EOS})


def test_ignore_eos_runs_to_max_tokens(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model=MODEL, prompt="hi", max_tokens=50, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 50
    assert engine.calls[0].stop_token_ids == frozenset()


def test_openais_defaults_and_sampling_reach_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(model=MODEL, prompt="hi")
    client.completions.create(
        model=MODEL,
        prompt="hi",
        temperature=0.5,
        top_p=0.9,
        seed=7,
        user="me",
        n=1,
        extra_body={"top_k": 5, "min_p": 0.25, "min_tokens": 3, "stop_token_ids": [1, 2]},
    )
    first, second = engine.calls
    seed = first.sampling.seed
    assert seed is not None, "drawn for it, so that a replay of the request gives the same tokens"
    assert (first.max_tokens, first.sampling) == (16, SamplingParams(temperature=1.0, seed=seed))
    assert second.sampling == SamplingParams(temperature=0.5, top_p=0.9, seed=7, top_k=5, min_p=0.25)
    assert (second.min_tokens, second.stop_token_ids) == (3, frozenset({EOS, 1, 2}))


@pytest.mark.parametrize("top_k", [-1, 0, None])
def test_top_k_of_all_is_none(url: str, engine: FakeEngine, top_k: int | None) -> None:
    assert post(url, top_k=top_k, seed=1).status == 200
    assert engine.calls[0].sampling == SamplingParams(temperature=1.0, seed=1)


def test_seeds_of_requests_that_name_none_differ(url: str, engine: FakeEngine) -> None:
    post(url, prompt=["a", "b"])
    assert len({call.sampling.seed for call in engine.calls}) == 2


@pytest.mark.parametrize(("max_tokens", "expected"), [(None, MAX_LEN - 2), (3, 3)])
def test_no_max_tokens_is_the_rest_of_the_context(
    url: str, engine: FakeEngine, max_tokens: int | None, expected: int
) -> None:
    """Null as vLLM has it; without the field 16, as OpenAI has it."""
    answer = post(url, prompt="hi", max_tokens=max_tokens, ignore_eos=True)
    assert answer.json["usage"]["completion_tokens"] == engine.calls[0].max_tokens == expected


def test_n_choices_of_each_prompt_draw_with_seeds_of_their_own(url: str, engine: FakeEngine) -> None:
    answer = post(url, prompt=["a", "bc"], n=3, max_tokens=2, seed=2**63 - 2)

    assert [choice["index"] for choice in answer.json["choices"]] == list(range(6))
    assert [(call.prompt, call.sampling.seed) for call in engine.calls] == [
        (prompt, seed) for prompt in ((97,), (98, 99)) for seed in (2**63 - 2, 2**63 - 1, -(2**63))
    ]
    assert answer.json["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
    assert len(set(engine.clients)) == 1, "they take the turns of one client"


def test_min_tokens_holds_off_stop_tokens_and_stop_strings(url: str, engine: FakeEngine) -> None:
    (choice,) = post(url, max_tokens=60, min_tokens=21, stop=["lo"]).json["choices"]
    assert choice["text"] == TEXT + TEXT[:3]  # the first end and the first stop string come too early
    assert choice["finish_reason"] == "stop"


def test_truncate_prompt_tokens_keeps_the_end(url: str, engine: FakeEngine) -> None:
    post(url, prompt="abcdef", truncate_prompt_tokens=2)
    post(url, prompt="abcdef", truncate_prompt_tokens=9)
    post(url, prompt="x" * MAX_LEN + "yz", truncate_prompt_tokens=-1, max_tokens=MAX_LEN - 2)
    assert [call.prompt for call in engine.calls] == [(101, 102), tuple(b"abcdef"), tuple(b"yz")]


@pytest.mark.parametrize(("skip", "expected"), [(None, "a"), (True, "a"), (False, "a<|bos|>")])
def test_special_tokens_are_skipped_unless_asked_for(
    url: str, engine: FakeEngine, skip: bool | None, expected: str
) -> None:
    outputs, engine.outputs = engine.outputs, [97, 256]
    try:
        answer = post(url, max_tokens=2, skip_special_tokens=skip)
    finally:
        engine.outputs = outputs
    assert answer.json["choices"][0]["text"] == expected


def test_log_probabilities_of_the_output(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model=MODEL, prompt="hi", max_tokens=2, logprobs=2)

    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens == ["h", "\N{REPLACEMENT CHARACTER}"]
    assert found.token_logprobs == [-104.0, -195.0]
    assert found.top_logprobs == [{"h": -104.0, "g": -103.0, "f": -102.0}, {"\N{REPLACEMENT CHARACTER}": -194.0}]
    assert found.text_offset == [0, 1]
    assert not engine.calls[0].is_prompt_scored


def test_echo_with_log_probabilities_scores_the_prompt(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model=MODEL, prompt=["abc", "d"], max_tokens=1, logprobs=1, echo=True)

    first, second = (choice.logprobs for choice in answer.choices)
    assert [choice.text for choice in answer.choices] == ["abch", "dh"]
    assert first is not None
    assert first.tokens == ["a", "b", "c", "h"]
    assert first.token_logprobs == [None, -98.0, -99.0, -104.0]
    assert first.top_logprobs == [
        None,
        {"a": -97.0, "b": -98.0},
        {"b": -98.0, "c": -99.0},
        {"g": -103.0, "h": -104.0},
    ]
    assert first.text_offset == [0, 1, 2, 3]
    assert second is not None
    assert second.tokens == ["d", "h"]


def test_max_tokens_0_scores_the_prompt_alone(url: str, engine: FakeEngine) -> None:
    answer = post(url, prompt="abc", max_tokens=0, echo=True, logprobs=0).json

    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -98.0, -99.0]
    assert post(url, prompt="abc", max_tokens=0).json["choices"][0]["text"] == ""


@pytest.mark.parametrize("echo", [True, False])
def test_a_stream_brings_the_same_as_a_whole_answer(url: str, engine: FakeEngine, echo: bool) -> None:
    body: dict[str, Any] = {"prompt": ["ab", "c"], "max_tokens": 30, "logprobs": 1, "echo": echo, "n": 2, "seed": 1}
    whole = post(url, **body).json["choices"]
    texts = [""] * 4
    logprobs: list[dict[str, list[Any]]] = [{} for _ in range(4)]
    for event in events_of(post(url, stream=True, **body).text)[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        for name, values in choice["logprobs"].items():
            logprobs[choice["index"]].setdefault(name, []).extend(values)

    assert texts == [choice["text"] for choice in whole]
    assert logprobs == [choice["logprobs"] for choice in whole]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(97, 98)]),
        (["a", "bc"], [(97,), (98, 99)]),
        ([1, 2, 258], [(1, 2, 258)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_all_four_kinds_of_prompt(
    client: openai.OpenAI, engine: FakeEngine, prompt: Any, expected: list[tuple[int, ...]]
) -> None:
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=3)

    assert sorted(call.prompt for call in engine.calls) == sorted(expected)
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3 * len(expected)


def test_a_stream_gives_one_event_a_token_and_no_broken_character(client: openai.OpenAI, engine: FakeEngine) -> None:
    events = list(client.completions.create(model=MODEL, prompt="hi", max_tokens=100, stream=True))

    assert len(events) == len(TEXT.encode()) + 1
    assert "".join(event.choices[0].text for event in events) == TEXT
    assert all("\N{REPLACEMENT CHARACTER}" not in event.choices[0].text for event in events)
    assert [event.choices[0].finish_reason for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert len({event.id for event in events}) == 1
    assert engine.num_aborted == 0


def test_a_stream_tells_usage_when_asked(client: openai.OpenAI, engine: FakeEngine) -> None:
    *events, last = client.completions.create(
        model=MODEL, prompt="hi", max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    assert all(event.usage is None for event in events)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (2, 5, 7)


def test_the_stream_on_the_wire(url: str, engine: FakeEngine) -> None:
    answer = post(url, max_tokens=2, stream=True)

    assert answer.headers["content-type"].startswith("text/event-stream")
    first, _, done = events_of(answer.text)
    assert done == "[DONE]"
    assert first["object"] == "text_completion"
    assert "usage" not in first


def test_usage_comes_with_every_event_when_asked(url: str, engine: FakeEngine) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last, _ = events_of(post(url, prompt="abc", max_tokens=3, stream=True, stream_options=options).text)
    assert [event["usage"]["completion_tokens"] for event in (*events, last)] == [1, 2, 3, 3]
    assert {event["usage"]["prompt_tokens"] for event in (*events, last)} == {3}
    assert last["choices"] == []


def test_a_stream_of_several_prompts_names_each(client: openai.OpenAI, engine: FakeEngine) -> None:
    texts = {0: "", 1: ""}
    for event in client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=100, stream=True):
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == {0: TEXT, 1: TEXT}


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_text_before_itself(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    answer: Any = client.completions.create(
        model=MODEL, prompt="hi", max_tokens=100, stop=["zzz", "本 "], stream=stream
    )
    choices = [event.choices[0] for event in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == "héllo 日"
    assert choices[-1].finish_reason == "stop"
    until(lambda: engine.num_aborted == 1)


def test_async_client_serves_many_at_once(url: str, engine: FakeEngine) -> None:
    async def run() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.completions.create(model=MODEL, prompt=f"p{i}", max_tokens=100) for i in range(8))
            )
            events = await client.completions.create(model=MODEL, prompt="s", max_tokens=100, stream=True)
            streamed = "".join([event.choices[0].text async for event in events])
            return [answer.choices[0].text for answer in answers], streamed

    assert asyncio.run(run()) == ([TEXT] * 8, TEXT)


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_can_never_fit_is_refused_with_the_sizes(
    client: openai.OpenAI, engine: FakeEngine, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match="900 tokens of KV cache, node small holds 500"):
        client.completions.create(model=MODEL, prompt=["ok", "huge"], stream=stream)


@pytest.mark.parametrize(("prompt", "stream"), [("down", True), ("down", False), ("die", False), ("end", False)])
def test_a_cluster_that_goes_down_answers_503(
    client: openai.OpenAI, engine: FakeEngine, prompt: str, stream: bool
) -> None:
    with pytest.raises(openai.InternalServerError, match=r"died|ended") as caught:
        client.completions.create(model=MODEL, prompt=[prompt, "x"], stream=stream)
    assert caught.value.status_code == 503


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_a_node_cannot_run_is_500_with_the_reason(
    client: openai.OpenAI, engine: FakeEngine, stream: bool
) -> None:
    with pytest.raises(openai.InternalServerError, match="logits are not finite") as caught:
        client.completions.create(model=MODEL, prompt="spoilt", stream=stream)
    assert caught.value.status_code == 500
    assert caught.value.code == "request_failed"


def test_a_failure_after_the_first_token_is_an_event(client: openai.OpenAI, engine: FakeEngine) -> None:
    events = client.completions.create(model=MODEL, prompt="die", stream=True)
    assert "".join(event.choices[0].text for event in itertools.islice(events, 3)) == "hé"
    with pytest.raises(openai.APIError, match="node small died"):
        next(events)


def test_a_body_breaks_off_after_an_error(url: str, engine: FakeEngine) -> None:
    """Some clients count a stream that ends in order as a success."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "die", "stream": True}))
    with pytest.raises(http.client.IncompleteRead) as caught:
        connection.getresponse().read()
    connection.close()
    *events, last = events_of(caught.value.partial.decode())
    assert len(events) == 3
    assert "node small died" in last["error"]["message"]


def test_a_bug_is_500_without_its_details(client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.InternalServerError, match="internal error") as caught:
        client.completions.create(model=MODEL, prompt="bug")
    assert caught.value.status_code == 500


@pytest.mark.parametrize("prompt", ["hang", "mute"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_aborts_its_requests(url: str, engine: FakeEngine, prompt: str, stream: bool) -> None:
    body = json.dumps({"model": MODEL, "prompt": [prompt, prompt], "stream": stream})
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("POST", "/v1/completions", body)
    until(lambda: engine.num_running == 2)
    until(lambda: metric(url, "helixbench_requests_in_flight") == 2)

    connection.close()

    until(lambda: engine.num_aborted == 2)
    until(lambda: metric(url, "helixbench_requests_in_flight") == 0)


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"max_tokens": -1}, "max_tokens", ">= 0"),
        ({"max_tokens": "many"}, "max_tokens", "int"),
        ({"max_tokens": MAX_LEN}, "max_tokens", f"{MAX_LEN + 1} tokens; this server takes {MAX_LEN}"),
        ({"prompt": "x" * MAX_LEN, "max_tokens": None}, "max_tokens", f"{MAX_LEN + 1} tokens"),
        ({"temperature": -1}, "temperature", "need 0 to 2"),
        ({"top_p": 0}, "top_p", "more than 0"),
        ({"top_k": -2}, "top_k", "got -2"),
        ({"min_p": 2}, "min_p", "need 0 to 1"),
        ({"min_tokens": 17}, "min_tokens", "at most max_tokens (16), got 17"),
        ({"seed": 2**63}, "seed", "64 bits"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": "x" * 1025}, "stop", "at most 1024 characters"),
        ({"stop": ["x"] * 65}, "stop", "65 given; at most 64"),
        ({"stop_token_ids": [320]}, "stop_token_ids", "token ids 0 to 319, got 320"),
        ({"prompt": ""}, "prompt", "at least one token"),
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": [[]]}, "prompt", "at least one token"),
        ({"prompt": ["a", 1]}, "prompt", "one kind"),
        ({"prompt": [320]}, "prompt", "need token ids 0 to 319, got 320"),
        ({"prompt": [-1]}, "prompt", "got -1"),
        ({"prompt": [[2**70]]}, "prompt", ""),
        ({"prompt": {"text": "x"}}, "prompt", "object"),
        ({"prompt": ["a"] * 1025}, "prompt", "1025 prompts"),
        ({"prompt": ["a"] * 600, "n": 2}, "prompt", "at most 1024 outputs"),
        ({"n": 0}, "n", ">= 1"),
        ({"n": 2, "best_of": 3}, "best_of", "only n (2) is served, got 3"),
        ({"logprobs": 21}, "logprobs", "need 0 to 20"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", ">= -1"),
        ({"stream_options": {"colour": 1}}, "stream_options", "colour"),
        ({"colour": "red"}, "colour", "unknown field `colour`"),
    ],
)
def test_bad_input_is_400_and_names_the_field(
    url: str, engine: FakeEngine, body: dict[str, Any], param: str, reason: str
) -> None:
    answer = post(url, **body)

    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"] == param
    assert reason in answer.error["message"]
    assert engine.calls == []


NEUTRAL_VALUES = [(field, value) for field, values in NEUTRAL.items() for value in (None, *values)]
OTHER_VALUES = {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": -1,
    "length_penalty": 2,
    "logit_bias": {"1": 2},
    "suffix": "x",
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "detokenize": False,
    "use_beam_search": True,
    "bad_words": ["x"],
    "guided_regex": "x",
    "prompt_logprobs": 1,
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_changes_nothing_is_accepted(url: str, engine: FakeEngine, path: str) -> None:
    """All fields in one body after the other; what one says twice is said in the next."""
    bodies: list[dict[str, Any]] = [dict.fromkeys(UNUSED, 3)]
    for field, value in NEUTRAL_VALUES:
        body = next((body for body in bodies if field not in body), {})
        body[field] = value
        if body not in bodies:
            bodies.append(body)
    assert len(bodies) > 2
    for body in (*bodies, {"logit_bias": {"5": 0.0}}, {"best_of": 2, "n": 2}, {"stream_options": None}):
        assert post(url, path, max_tokens=1, **body).status == 200
    assert post(url, path, stream_options={"include_usage": True}).status == 200, "harmless without a stream"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("field", OTHER_VALUES)
def test_what_would_change_an_output_is_refused_by_name(url: str, engine: FakeEngine, path: str, field: str) -> None:
    answer = post(url, path, **{field: OTHER_VALUES[field]})
    assert answer.status == 400
    assert answer.error["param"] == field
    assert answer.error["code"] == "unsupported_parameter"
    assert f"{field}: only " in answer.error["message"]
    assert engine.calls == []


def test_the_docs_list_every_neutral_field() -> None:
    page = (Path(__file__).parents[3] / "docs" / "tasks" / "http-api.md").read_text()
    assert [field for field in (*NEUTRAL, *UNUSED) if f"`{field}`" not in page] == []


def test_an_error_quotes_only_the_beginning_of_what_was_sent(url: str, engine: FakeEngine) -> None:
    answer = post(url, **{"y" * 100_000: 1})
    assert answer.status == 400
    assert len(answer.text) < 3000


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b'"\xff"', b'{"prompt": "\xff"}', b"[" * 100_000])
def test_a_body_that_is_no_request_is_400(url: str, engine: FakeEngine, raw: bytes) -> None:
    answer = ask(url, "POST", "/v1/completions", raw)
    assert answer.status == 400
    assert answer.error["message"]


def test_another_model_is_404(client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here; 'org/toy' is"):
        client.completions.create(model="gpt", prompt="hi")


def test_metrics_count_requests_and_tokens(client: openai.OpenAI, url: str, engine: FakeEngine) -> None:
    names = {
        "prompt": "helixbench_prompt_tokens_total",
        "output": "helixbench_output_tokens_total",
        "length": 'helixbench_requests_total{outcome="length"}',
        "ttft": "helixbench_ttft_seconds_count",
        "tpot": "helixbench_tpot_seconds_count",
    }
    before = {key: metric(url, name) for key, name in names.items()}

    client.completions.create(model=MODEL, prompt="hi", max_tokens=5)
    client.completions.create(model=MODEL, prompt="hi", max_tokens=1)

    assert {key: metric(url, name) - before[key] for key, name in names.items()} == {
        "prompt": 4,
        "output": 6,
        "length": 2,
        "ttft": 2,
        "tpot": 1,
    }
