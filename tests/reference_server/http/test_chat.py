"""``/v1/chat/completions``: the chat template, and answers as the protocol names them."""

from __future__ import annotations

import copy
import json
from typing import Any

import openai
import pytest

from helixbench.reference_server.http.text import TokenizerLike
from tests.reference_server.http.serving import MODEL, TEXT, FakeEngine, ask, events_of, post, serving

CHAT = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
RENDERED = "system: be brief\nuser: hi\nassistant: "


def prompt_of(engine: FakeEngine) -> str:
    return bytes(engine.calls[-1].prompt).decode()


def test_the_official_client_gets_a_message(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=100, temperature=0)

    assert prompt_of(engine) == RENDERED
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(RENDERED), len(TEXT.encode()) + 1)


def test_the_official_client_streams(client: openai.OpenAI, engine: FakeEngine) -> None:
    events = list(
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=100, stream=True, stream_options={"include_usage": True}
        )
    )
    *tokens, usage = events
    assert {event.object for event in events} == {"chat.completion.chunk"}
    assert len(tokens) == len(TEXT.encode()) + 1
    assert "".join(event.choices[0].delta.content or "" for event in tokens) == TEXT
    assert [event.choices[0].finish_reason for event in tokens] == [None] * (len(tokens) - 1) + ["stop"]
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == len(tokens)


def test_the_role_comes_with_the_first_token_and_not_ahead_of_it(url: str, engine: FakeEngine) -> None:
    first, second, *_ = events_of(post(url, CHAT, stream=True, max_tokens=3).text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "h"}
    assert set(second["choices"][0]["delta"]) == {"content"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("hi", "hi"),
        ([{"type": "text", "text": "hi"}], "hi"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        ([], ""),
        (None, ""),
    ],
)
def test_content_is_a_string_or_text_parts(url: str, engine: FakeEngine, content: Any, expected: str) -> None:
    message = {"role": "user", "name": "me", "content": content, "tool_calls": [], "refusal": None}
    assert post(url, CHAT, messages=[message]).status == 200
    assert prompt_of(engine) == f"user: {expected}\nassistant: "


def test_max_tokens_are_the_rest_of_the_context_unless_given(url: str, engine: FakeEngine) -> None:
    """The newer name of the two counts."""
    for limits in ({}, {"max_tokens": None}, {"max_tokens": 7}, {"max_tokens": 7, "max_completion_tokens": 5}):
        assert post(url, CHAT, **limits).status == 200
    rest = 200 - len("user: x\nassistant: ")
    assert [call.max_tokens for call in engine.calls] == [rest, rest, 7, 5]


def test_a_final_message_can_be_continued(url: str, engine: FakeEngine) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Well"}]
    post(url, CHAT, messages=messages, continue_final_message=True, max_tokens=1)
    assert prompt_of(engine) == "system: be brief\nuser: hi\nassistant: Well"
    post(url, CHAT, messages=MESSAGES, add_generation_prompt=False, max_tokens=1)
    assert prompt_of(engine) == "system: be brief\nuser: hi\n"


def test_log_probabilities_of_a_chat(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1, logprobs=True, top_logprobs=1)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    (token,) = found.content
    assert (token.token, token.logprob, token.bytes) == ("h", -104.0, [104])
    assert [(one.token, one.logprob, one.bytes) for one in token.top_logprobs] == [("g", -103.0, [103])]


def test_several_choices_stream_side_by_side(url: str, engine: FakeEngine) -> None:
    texts = ["", ""]
    roles = [0, 0]
    for event in events_of(post(url, CHAT, stream=True, n=2, max_tokens=100).text)[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"]["content"]
        roles[choice["index"]] += "role" in choice["delta"]
    assert (texts, roles) == ([TEXT, TEXT], [1, 1])


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hi"}, "messages", "array"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "messages[0]: "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None, "'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]", "text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls", "only []"),
        ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages[0].colour", "colour"),
        ({"messages": [{"role": "user", "content": ""}] * 300}, "messages", "300 messages"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "prompt", "characters"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"top_logprobs": 2}, "top_logprobs", "only with logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs", "0 to 20"),
        ({"echo": True}, "echo", "only completions"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize is not for the template"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "chat_template is not"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "messages", "template refuses"),
        ({"prompt": "hi"}, "prompt", "unknown field"),
    ],
)
def test_bad_input_is_400_and_names_the_place(
    url: str, engine: FakeEngine, body: dict[str, Any], param: str | None, reason: str
) -> None:
    answer = post(url, CHAT, **body)
    assert answer.status == 400
    assert param is None or answer.error["param"] == param
    assert reason in answer.error["message"]
    assert engine.calls == []


def templated(tokenizer: TokenizerLike, template: str | None) -> TokenizerLike:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_a_model_without_a_template_says_so_and_completes_texts(tokenizer: TokenizerLike) -> None:
    with serving(templated(tokenizer, None)) as served:
        answer = post(served.url, CHAT)
        assert answer.status == 400
        assert answer.error["message"] == "this model's tokenizer has no chat template; use /v1/completions"
        assert post(served.url).status == 200


def test_a_template_gets_its_arguments_and_may_refuse(tokenizer: TokenizerLike) -> None:
    template = "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ mood }}"
    with serving(templated(tokenizer, template)) as served:
        answer = post(served.url, CHAT, messages=MESSAGES)
        assert answer.status == 400
        assert "one at a time" in answer.error["message"]
        assert post(served.url, CHAT, chat_template_kwargs={"mood": "glad"}).status == 200
        assert prompt_of(served.engine) == "glad"


def test_a_template_cannot_reach_the_server(tokenizer: TokenizerLike) -> None:
    """Templates come with models, and run in a sandbox."""
    with serving(templated(tokenizer, "{{ messages.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}")) as served:
        answer = ask(served.url, "POST", CHAT, json.dumps({"messages": MESSAGES}).encode())
        assert answer.status == 400
        assert "unsafe" in answer.error["message"]
