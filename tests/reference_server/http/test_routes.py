"""The other routes, keys, names, methods, and what browsers ask."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from helixbench.reference_server.http.engine_protocol import Load
from helixbench.reference_server.http.options import HttpOptions
from helixbench.reference_server.http.text import TokenizerLike
from tests.reference_server.http.serving import MODEL, FakeEngine, ask, metric, post, serving

GET_ROUTES = ("/v1/models", f"/v1/models/{MODEL}", "/health", "/ready", "/live", "/ping", "/version", "/metrics")
POST_ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


def test_models(client: openai.OpenAI, engine: FakeEngine) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "helixbench"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_health_and_readiness_follow_the_cluster_and_liveness_does_not(url: str, engine: FakeEngine) -> None:
    for path in ("/health", "/ready", "/ping"):
        assert ask(url, "GET", path).json["status"] == "ready"
    engine.is_ready = False
    for path in ("/health", "/ready", "/ping"):
        answer = ask(url, "GET", path)
        assert answer.status == 503
        assert (answer.json["status"], answer.json["detail"]) == ("down", "node small does not answer")
        assert answer.json["nodes"] == {"small": {"state": "lost", "ratio": 1.0, "progress_age_s": None}}
    assert 'helixbench_node_state{node="small",state="lost"} 1.0' in ask(url, "GET", "/metrics").text
    assert ask(url, "GET", "/live").status == 200


def test_the_version_is_the_packages(url: str) -> None:
    assert ask(url, "GET", "/version").json["version"].count(".") == 2


@pytest.mark.parametrize("path", GET_ROUTES)
def test_head_has_no_body(url: str, path: str) -> None:
    answer = ask(url, "HEAD", path)
    assert (answer.status, answer.text) == (200, "")


@pytest.mark.parametrize("path", [*GET_ROUTES, *POST_ROUTES])
def test_options_names_the_methods(url: str, path: str) -> None:
    answer = ask(url, "OPTIONS", path)
    assert answer.status == 204
    assert ("POST" if path in POST_ROUTES else "GET, ") in answer.headers["allow"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/completions", 405), ("POST", "/v1/chat", 404)])
def test_unknown_routes_answer_in_openais_format(
    url: str, engine: FakeEngine, method: str, path: str, status: int
) -> None:
    answer = ask(url, method, path)
    assert answer.status == status
    assert path in answer.error["message"]


def test_texts_and_conversations_are_tokenised(url: str) -> None:
    answer = post(url, "/tokenize", prompt="aé", return_token_strs=True).json
    assert answer == {
        "count": 3,
        "max_model_len": 200,
        "tokens": [97, 195, 169],
        "token_strs": ["a", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"],
    }
    chat = ask(url, "POST", "/tokenize", json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()).json
    assert bytes(chat["tokens"]) == b"user: x\nassistant: "
    assert post(url, "/detokenize", prompt=None, tokens=[97, 195, 169]).error["param"] == "prompt"
    body = json.dumps({"tokens": [97, 195, 169, 257]}).encode()
    assert ask(url, "POST", "/detokenize", body).json == {"prompt": "aé<|eos|>"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user"}]}, "prompt"),
        ("/tokenize", {"prompt": "x" * 10_000}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_bad_texts_and_tokens_are_400(url: str, path: str, body: dict[str, Any], param: str) -> None:
    answer = ask(url, "POST", path, json.dumps(body).encode())
    assert (answer.status, answer.error["param"]) == (400, param)


def test_a_key_is_needed_where_one_is_set(tokenizer: TokenizerLike) -> None:
    with serving(tokenizer, HttpOptions(api_keys=("first", "sécond"))) as served:
        for path in POST_ROUTES:
            answer = post(served.url, path)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        for header in ("Bearer wrong", "Bearer ", "Basic first", "first", "Bearer first second"):
            assert ask(served.url, "GET", "/v1/models", headers={"authorization": header}).status == 401
        for header in ("Bearer first", "bearer first", "Bearer " + "sécond".encode().decode("latin-1")):
            assert ask(served.url, "GET", "/v1/models", headers={"authorization": header}).status == 200
        for path in ("/health", "/ready", "/live", "/ping", "/version", "/metrics"):
            assert ask(served.url, "GET", path).status == 200
        assert ask(served.url, "OPTIONS", "/v1/completions").status == 204
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="first", max_retries=0) as client:
            assert client.completions.create(model=MODEL, prompt="x").choices
        with (
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="no", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_a_model_may_have_several_names(tokenizer: TokenizerLike) -> None:
    with serving(tokenizer, names=("org/name", "alias")) as served:
        listed = ask(served.url, "GET", "/v1/models").json["data"]
        assert [card["id"] for card in listed] == ["org/name", "alias"]
        assert post(served.url, model="alias").json["model"] == "alias"
        assert post(served.url, model=None).json["model"] == "org/name"
        answer = post(served.url, model="gpt")
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert answer.error["message"] == "model 'gpt' is not served here; 'org/name' is"


def test_pages_of_allowed_origins_may_call(tokenizer: TokenizerLike) -> None:
    with serving(tokenizer, HttpOptions(cors_origins=("https://here",), api_keys=("k",))) as served:
        asked = {"origin": "https://here", "access-control-request-method": "POST"}
        preflight = ask(served.url, "OPTIONS", "/v1/completions", headers=asked)
        assert preflight.headers["access-control-allow-origin"] == "https://here"
        refused = ask(served.url, "POST", "/v1/completions", b"{}", {"origin": "https://here"})
        assert refused.status == 401
        assert refused.headers["access-control-allow-origin"] == "https://here", "the page can read why"
        other = ask(served.url, "GET", "/health", headers={"origin": "https://elsewhere"})
        assert "access-control-allow-origin" not in other.headers


def test_without_the_option_no_origin_is_allowed(url: str) -> None:
    answer = ask(url, "GET", "/health", headers={"origin": "https://here"})
    assert "access-control-allow-origin" not in answer.headers


def test_too_many_that_wait_are_429_with_a_time_to_come_back(url: str, engine: FakeEngine) -> None:
    engine.load_now = Load(num_running=5, num_waiting=2047, waiting_tokens=10, kv_usage=1.0)
    assert post(url).status == 200
    answer = post(url, prompt=["a", "b"])
    assert (answer.status, answer.error["type"]) == (429, "rate_limit_error")
    assert answer.headers["retry-after"] == "1"

    engine.load_now = Load(num_running=5, num_waiting=1, waiting_tokens=4 * 2**20, kv_usage=1.0)
    assert post(url).status == 429


def test_metrics_under_the_names_that_dashboards_look_for(url: str, engine: FakeEngine) -> None:
    engine.load_now = Load(num_running=3, num_waiting=4, waiting_tokens=10, kv_usage=0.25)
    label = f'{{model_name="{MODEL}"}}'
    counted = [
        f"vllm:time_to_first_token_seconds_count{label}",
        f"vllm:inter_token_latency_seconds_count{label}",
        f"vllm:e2e_request_latency_seconds_count{label}",
        f"vllm:prompt_tokens_total{label}",
        f"vllm:generation_tokens_total{label}",
        f'vllm:request_success_total{{finished_reason="length",model_name="{MODEL}"}}',
    ]
    before = [metric(url, name) for name in counted]

    post(url, prompt="abc", max_tokens=5)

    after = [metric(url, name) for name in counted]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 4, 1, 3, 5, 1]
    assert metric(url, f"vllm:num_requests_running{label}") == 3
    assert metric(url, f"vllm:num_requests_waiting{label}") == 4
    assert metric(url, f"vllm:kv_cache_usage_perc{label}") == 0.25


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"max_waiting": 0}, "max_waiting: need more than 0"),
        ({"max_prompts": 5, "max_waiting": 4}, "at most max_waiting"),
        ({"stall_timeout_s": float("nan")}, "stall_timeout_s"),
        ({"api_keys": ("",)}, "api_keys"),
    ],
)
def test_impossible_options_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        HttpOptions(**fields)


def test_nodes_are_drained_by_name(url: str, engine: FakeEngine) -> None:
    assert ask(url, "POST", "/cluster/drain/small").status == 202
    assert engine.drained == ["small"]
    unknown = ask(url, "POST", "/cluster/drain/large")
    assert unknown.status == 404
    assert unknown.error["message"] == "there is no node large; there are small"
