from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, NamedTuple

import openai
import pytest
import uvicorn

from helixbench.reference_server.http.app import make_app
from helixbench.reference_server.http.connection import MAX_BODY_BYTES
from helixbench.reference_server.http.engine_protocol import EngineUnavailable, Health, RequestRefused, TokenOut
from helixbench.solver.scheduling.work import SamplingParams

EOS = 257
MAX_LEN = 200
TEXT = "héllo 日本 😀!"
WAIT_S = 20.0


class ByteTokenizer:
    eos_token_id: int | None = EOS

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")

    def __len__(self) -> int:
        return 259


class FakeEngine:
    """Answers every prompt with ``TEXT`` again and again, then eos; what a prompt begins with can make it misbehave."""

    def __init__(self) -> None:
        self.is_ready = True
        self.calls: list[tuple[tuple[int, ...], int, SamplingParams, frozenset[int]]] = []
        self.num_running = 0
        self.num_aborted = 0
        self.outputs = [*TEXT.encode(), EOS]

    async def generate(
        self, prompt: Sequence[int], *, max_tokens: int, sampling: SamplingParams, stop_token_ids: frozenset[int]
    ) -> AsyncGenerator[TokenOut, None]:
        self.calls.append((tuple(prompt), max_tokens, sampling, stop_token_ids))
        word = bytes(token for token in prompt if token < 256).decode()
        if word.startswith("huge"):
            raise RequestRefused("needs 900 tokens of KV cache, node small holds 500")
        if word.startswith("down"):
            raise EngineUnavailable("node small died")
        if word.startswith("bug"):
            raise KeyError("bug")
        self.num_running += 1
        is_done = False
        try:
            if word.startswith("mute"):
                await asyncio.sleep(WAIT_S)
            for number in range(max_tokens):
                token = self.outputs[number % len(self.outputs)]
                if number == 3 and word.startswith("hang"):
                    await asyncio.sleep(WAIT_S)
                if number == 3 and word.startswith("die"):
                    raise EngineUnavailable("node small died")
                if number == 3 and word.startswith("end"):
                    return
                await asyncio.sleep(0)
                is_stop = token in stop_token_ids
                is_done = is_stop or number == max_tokens - 1
                yield TokenOut(token, is_done, "stop" if is_stop else "length" if is_done else "")
                if is_done:
                    return
        finally:
            self.num_running -= 1
            self.num_aborted += not is_done

    def health(self) -> Health:
        if self.is_ready:
            return Health(is_ready=True, nodes={"small": "serving"})
        return Health(is_ready=False, detail="node small does not answer", nodes={"small": "gone"})


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeEngine, str]]:
    """A fake engine behind a real server, and the server's address."""
    engine = FakeEngine()
    app = make_app(engine, tokenizer=ByteTokenizer(), model_name="org/toy", max_model_len=MAX_LEN)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        until(lambda: server.started)
        yield engine, f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


def until(is_true: Any) -> None:
    deadline = time.perf_counter() + WAIT_S
    while not is_true():
        assert time.perf_counter() < deadline, "did not come about"
        time.sleep(0.002)


@pytest.fixture
def engine(served: tuple[FakeEngine, str]) -> Iterator[FakeEngine]:
    engine = served[0]
    engine.calls.clear()
    engine.num_aborted = 0
    yield engine
    engine.is_ready = True
    until(lambda: engine.num_running == 0)


@pytest.fixture
def url(served: tuple[FakeEngine, str]) -> str:
    return served[1]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client


class Answer(NamedTuple):
    status: int
    content_type: str
    text: str

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.text)["error"]
        return error


def ask(url: str, method: str, path: str, content: bytes | None = None) -> Answer:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=WAIT_S)
    try:
        connection.request(method, path, content)
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers["content-type"], answer.read().decode())
    finally:
        connection.close()


def post(url: str, **body: Any) -> Answer:
    return ask(url, "POST", "/v1/completions", json.dumps({"model": "org/toy", "prompt": "x"} | body).encode())


def metric(url: str, name: str) -> float:
    for line in ask(url, "GET", "/metrics").text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[-1])
    return 0.0


def test_a_completion_ends_at_eos(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model="org/toy", prompt="hi", max_tokens=100, temperature=0)

    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, len(TEXT.encode()) + 1)
    assert engine.calls == [((104, 105), 100, SamplingParams(temperature=0), frozenset({EOS}))]


def test_ignore_eos_runs_to_max_tokens(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model="org/toy", prompt="hi", max_tokens=50, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 50
    assert engine.calls[0][3] == frozenset()


def test_openais_defaults_and_sampling_reach_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(model="org/toy", prompt="hi")
    client.completions.create(model="org/toy", prompt="hi", temperature=0.5, top_p=0.9, seed=7, user="me", n=1)
    assert engine.calls[0][1:3] == (16, SamplingParams(temperature=1.0, top_p=1.0, seed=None))
    assert engine.calls[1][2] == SamplingParams(temperature=0.5, top_p=0.9, seed=7)


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
    answer = client.completions.create(model="org/toy", prompt=prompt, max_tokens=3)

    assert sorted(call[0] for call in engine.calls) == sorted(expected)
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3 * len(expected)


def test_a_stream_gives_one_event_a_token_and_no_broken_character(client: openai.OpenAI, engine: FakeEngine) -> None:
    events = list(client.completions.create(model="org/toy", prompt="hi", max_tokens=100, stream=True))

    assert len(events) == len(TEXT.encode()) + 1
    assert "".join(event.choices[0].text for event in events) == TEXT
    assert all("\N{REPLACEMENT CHARACTER}" not in event.choices[0].text for event in events)
    assert [event.choices[0].finish_reason for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert len({event.id for event in events}) == 1
    assert engine.num_aborted == 0


def test_a_stream_tells_usage_when_asked(client: openai.OpenAI, engine: FakeEngine) -> None:
    *events, last = client.completions.create(
        model="org/toy", prompt="hi", max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    assert all(event.usage is None for event in events)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (2, 5, 7)


def test_the_stream_on_the_wire(url: str, engine: FakeEngine) -> None:
    answer = post(url, max_tokens=2, stream=True)

    assert answer.content_type.startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert [event[:6] for event in events[:-1]] == ["data: "] * 3
    assert events[2:] == ["data: [DONE]", ""]
    assert "usage" not in json.loads(events[0][6:])


def test_a_stream_of_several_prompts_names_each(client: openai.OpenAI, engine: FakeEngine) -> None:
    texts = {0: "", 1: ""}
    for event in client.completions.create(model="org/toy", prompt=["a", "b"], max_tokens=100, stream=True):
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == {0: TEXT, 1: TEXT}


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_text_before_itself(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    answer: Any = client.completions.create(
        model="org/toy", prompt="hi", max_tokens=100, stop=["zzz", "本 "], stream=stream
    )
    choices = [event.choices[0] for event in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == "héllo 日"
    assert choices[-1].finish_reason == "stop"
    until(lambda: engine.num_aborted == 1)


def test_async_client_serves_many_at_once(url: str, engine: FakeEngine) -> None:
    async def run() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.completions.create(model="org/toy", prompt=f"p{i}", max_tokens=100) for i in range(8))
            )
            events = await client.completions.create(model="org/toy", prompt="s", max_tokens=100, stream=True)
            streamed = "".join([event.choices[0].text async for event in events])
            return [answer.choices[0].text for answer in answers], streamed

    assert asyncio.run(run()) == ([TEXT] * 8, TEXT)


def test_models_and_health(client: openai.OpenAI, url: str, engine: FakeEngine) -> None:
    assert [model.id for model in client.models.list()] == ["org/toy"]
    assert client.models.retrieve("org/toy").owned_by == "helixbench"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    answer = ask(url, "GET", "/health")
    assert (answer.status, json.loads(answer.text)["status"]) == (200, "ready")


def test_a_cluster_that_is_down_answers_503(client: openai.OpenAI, url: str, engine: FakeEngine) -> None:
    engine.is_ready = False
    with pytest.raises(openai.InternalServerError, match="node small does not answer") as caught:
        client.completions.create(model="org/toy", prompt="hi")
    assert caught.value.status_code == 503
    assert engine.calls == []
    answer = ask(url, "GET", "/health")
    assert answer.status == 503
    assert json.loads(answer.text) == {
        "status": "down",
        "detail": "node small does not answer",
        "nodes": {"small": "gone"},
    }


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_can_never_fit_is_refused_with_the_sizes(
    client: openai.OpenAI, engine: FakeEngine, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match="900 tokens of KV cache, node small holds 500"):
        client.completions.create(model="org/toy", prompt=["ok", "huge"], stream=stream)


@pytest.mark.parametrize(("prompt", "stream"), [("down", True), ("down", False), ("die", False), ("end", False)])
def test_a_cluster_that_goes_down_answers_503(
    client: openai.OpenAI, engine: FakeEngine, prompt: str, stream: bool
) -> None:
    with pytest.raises(openai.InternalServerError, match=r"died|ended") as caught:
        client.completions.create(model="org/toy", prompt=[prompt, "x"], stream=stream)
    assert caught.value.status_code == 503


def test_a_failure_after_the_first_token_is_an_event(client: openai.OpenAI, engine: FakeEngine) -> None:
    events = client.completions.create(model="org/toy", prompt="die", stream=True)
    assert "".join(event.choices[0].text for event in itertools.islice(events, 3)) == "hé"
    with pytest.raises(openai.APIError, match="node small died"):
        next(events)


def test_a_bug_is_500_without_its_details(client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.InternalServerError, match="internal error") as caught:
        client.completions.create(model="org/toy", prompt="bug")
    assert caught.value.status_code == 500


@pytest.mark.parametrize("prompt", ["hang", "mute"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_aborts_its_requests(url: str, engine: FakeEngine, prompt: str, stream: bool) -> None:
    body = json.dumps({"model": "org/toy", "prompt": [prompt, prompt], "stream": stream})
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
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": "many"}, "max_tokens", "int"),
        ({"max_tokens": MAX_LEN}, "max_tokens", f"{MAX_LEN + 1} tokens; this server takes {MAX_LEN}"),
        ({"temperature": -1}, "temperature", "need 0 to 2"),
        ({"top_p": 0}, "top_p", "more than 0"),
        ({"seed": 2**63}, "seed", "64 bits"),
        ({"stop": [""]}, "stop", "empty"),
        ({"prompt": ""}, "prompt", "at least one token"),
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": [[]]}, "prompt", "at least one token"),
        ({"prompt": ["a", 1]}, "prompt", "one kind"),
        ({"prompt": [259]}, "prompt", "need token ids 0 to 258, got 259"),
        ({"prompt": [-1]}, "prompt", "got -1"),
        ({"prompt": [[2**70]]}, "prompt", ""),
        ({"prompt": {"text": "x"}}, "prompt", "object"),
        ({"n": 2}, "n", "no n other than 1"),
        ({"best_of": 3}, "best_of", "best_of"),
        ({"echo": True}, "echo", "echo"),
        ({"logprobs": 0}, "logprobs", "logprobs"),
        ({"suffix": "x"}, "suffix", "suffix"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "logit_bias"),
        ({"presence_penalty": 0.1}, "presence_penalty", "presence_penalty"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
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


def test_explicit_nulls_and_defaults_are_accepted(url: str, engine: FakeEngine) -> None:
    answer = post(url, n=1, best_of=1, echo=False, logprobs=None, suffix=None, logit_bias={}, stop=None, stream=None)
    assert answer.status == 200


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"model": "org/toy"}', b'"\xff"'])
def test_a_body_that_is_no_request_is_400(url: str, engine: FakeEngine, raw: bytes) -> None:
    answer = ask(url, "POST", "/v1/completions", raw)
    assert answer.status == 400
    assert answer.error["message"]


def test_a_body_beyond_the_limit_is_413(url: str, engine: FakeEngine) -> None:
    assert post(url, prompt="x" * MAX_BODY_BYTES).status == 413


def test_another_model_is_404(client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here; 'org/toy' is"):
        client.completions.create(model="gpt", prompt="hi")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/completions", 405), ("POST", "/v1/chat", 404)])
def test_unknown_routes_answer_in_openais_format(
    url: str, engine: FakeEngine, method: str, path: str, status: int
) -> None:
    answer = ask(url, method, path)
    assert answer.status == status
    assert path in answer.error["message"]


def test_metrics_count_requests_and_tokens(client: openai.OpenAI, url: str, engine: FakeEngine) -> None:
    names = {
        "prompt": "helixbench_prompt_tokens_total",
        "output": "helixbench_output_tokens_total",
        "length": 'helixbench_requests_total{outcome="length"}',
        "ttft": "helixbench_ttft_seconds_count",
        "tpot": "helixbench_tpot_seconds_count",
    }
    before = {key: metric(url, name) for key, name in names.items()}

    client.completions.create(model="org/toy", prompt="hi", max_tokens=5)
    client.completions.create(model="org/toy", prompt="hi", max_tokens=1)

    assert {key: metric(url, name) - before[key] for key, name in names.items()} == {
        "prompt": 4,
        "output": 6,
        "length": 2,
        "ttft": 2,
        "tpot": 1,
    }
