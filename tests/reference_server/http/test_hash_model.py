"""A hash model over HTTP: token ids in, numbers out; what takes a tokenizer or logits is refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helixbench.reference_server.http.app import ServedModel, make_app
from helixbench.reference_server.http.engine_thread import EngineThread
from helixbench.reference_server.http.options import HttpOptions
from helixbench.reference_server.http.server import load_tokenizer
from helixbench.reference_server.http.text import Text
from tests.hash_models import expected_tokens, make_small
from tests.reference_server.http.serving import MODEL, VOCAB_SIZE, post, running_server, serving
from tests.reference_server.plans import THREE_IN_A_ROW, make_plan
from tests.reference_server.running import RunningAgents


@pytest.mark.parametrize(
    ("path", "body", "field", "why"),
    [
        ("completions", {"prompt": "1 2 3"}, "prompt", "has no tokenizer; send token ids"),
        (
            "completions",
            {"prompt": [[1], [2]], "temperature": 0.5},
            "temperature",
            "decodes greedily; send temperature 0",
        ),
        ("completions", {"prompt": [1, 2]}, "temperature", "decodes greedily; send temperature 0"),
        ("completions", {"prompt": [1], "temperature": 0, "logprobs": 2}, "logprobs", "has no log probabilities"),
        (
            "completions",
            {"prompt": [1], "temperature": 0, "min_tokens": 2},
            "min_tokens",
            "cannot pass over stop tokens",
        ),
        ("chat/completions", {"temperature": 0}, "prompt", "has no tokenizer; send token ids"),
    ],
    ids=["text", "temperature", "default temperature", "logprobs", "min_tokens", "chat"],
)
def test_what_takes_a_tokenizer_or_logits_is_refused(
    tmp_path: Path, path: str, body: dict[str, Any], field: str, why: str
) -> None:
    tokenizer = load_tokenizer(make_small(tmp_path, vocab_size=VOCAB_SIZE))
    with serving(tokenizer, is_hash_model=True) as served:
        answer = post(served.url, f"/v1/{path}", **body)
        assert served.engine.calls == []
    assert answer.status == 400
    assert answer.error["param"] == field
    assert answer.error["message"].startswith(f"{field}: this model is a hash model, which {why}")


def test_token_ids_are_answered_by_the_models_tokens(running: RunningAgents, tmp_path: Path) -> None:
    model = make_small(tmp_path / "hash")
    prompts = [[7, 8, 9], [500, 1]]
    served = ServedModel(names=(MODEL,), max_tokens=100, vocab_size=1000, eos_token_ids=frozenset(), is_hash_model=True)
    with running.engine(make_plan(model.directory, *THREE_IN_A_ROW), model.directory) as engine:
        thread, text = EngineThread(engine), Text(load_tokenizer(model), max_tokens=100)
        thread.start()
        try:
            app = make_app(thread, text=text, model=served, options=HttpOptions())
            with running_server(app, HttpOptions()) as (host, port):
                answer = post(f"http://{host}:{port}", prompt=prompts, temperature=0, max_tokens=8)
        finally:
            thread.stop()
            text.close()

    assert answer.status == 200, answer.text
    assert [[int(word) for word in choice["text"].split()] for choice in answer.json["choices"]] == [
        expected_tokens(model, prompt, 8) for prompt in prompts
    ]
