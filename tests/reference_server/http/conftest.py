"""One server with a fake engine for all tests that need no other options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from helixbench.reference_server.http.text import TokenizerLike
from tests.conftest import ModelDir
from tests.reference_server.http.serving import WAIT_S, FakeEngine, Served, serving, until


@pytest.fixture(scope="session")
def tokenizer(model_dir: ModelDir) -> TokenizerLike:
    """One token per byte, with the chat template that made models have."""
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(model_dir("test-llama"))
    return loaded  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def served(tokenizer: TokenizerLike) -> Iterator[Served]:
    with serving(tokenizer) as served:
        yield served


@pytest.fixture
def engine(served: Served) -> Iterator[FakeEngine]:
    engine = served.engine
    engine.calls.clear()
    engine.clients.clear()
    engine.num_aborted = 0
    idle = engine.load_now
    yield engine
    engine.is_ready = True
    engine.load_now = idle
    until(lambda: engine.num_running == 0)


@pytest.fixture
def url(served: Served, engine: FakeEngine) -> str:
    return served.url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client
