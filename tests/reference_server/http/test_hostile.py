"""What no client should send leaves nothing behind: the same answers as before, and no KV slot held."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from helixbench.reference_server.coordinator.engine import Engine
from helixbench.reference_server.http.app import ServedModel, make_app
from helixbench.reference_server.http.engine_thread import EngineThread
from helixbench.reference_server.http.options import HttpOptions
from helixbench.reference_server.http.text import Text, TokenizerLike
from tests.conftest import ModelDir
from tests.reference_server.http import hostile
from tests.reference_server.http.hostile import ATTACKS, Address, HealthWatch, greedy
from tests.reference_server.http.serving import EOS, MODEL, VOCAB_SIZE, running_server, serving, until
from tests.reference_server.plans import ONE_NODE, make_plan
from tests.reference_server.running import RunningAgents

OPTIONS = HttpOptions(request_timeout_s=1.0, stall_timeout_s=1.0)
MAX_TOKENS = 1024


class Target(NamedTuple):
    """A server to be attacked: where it listens, and whether nothing of any request is left in it."""

    address: Address
    is_idle: Callable[[], bool]


@pytest.fixture(scope="module")
def fake(tokenizer: TokenizerLike) -> Iterator[Target]:
    with serving(tokenizer, OPTIONS) as served:
        yield Target(served.address, lambda: served.engine.num_running == 0)


@contextmanager
def real_server(engine: Engine, tokenizer: TokenizerLike) -> Iterator[Target]:
    thread = EngineThread(engine)
    model = ServedModel(names=(MODEL,), max_tokens=MAX_TOKENS, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({EOS}))
    text = Text(tokenizer, max_tokens=MAX_TOKENS)
    thread.start()
    try:
        with running_server(make_app(thread, text=text, model=model, options=OPTIONS), OPTIONS) as address:
            yield Target(address, lambda: not (load := thread.load()).num_running + load.num_waiting)
    finally:
        thread.stop()
        text.close()


@pytest.fixture(scope="module")
def real(running: RunningAgents, model_dir: ModelDir, tokenizer: TokenizerLike) -> Iterator[Target]:
    model = model_dir("test-llama")
    with (
        running.engine(make_plan(model, *ONE_NODE, max_batch_tokens=256), model) as engine,
        real_server(engine, tokenizer) as target,
    ):
        yield target
        assert set(engine.coordinator.kv_held_tokens.values()) == {0}


@pytest.fixture(params=["fake", "real"])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """A server, whose greedy answer is the same afterwards and which holds nothing then."""
    target: Target = request.getfixturevalue(request.param)
    before = greedy(target.address)
    yield target
    until(target.is_idle)
    assert greedy(target.address) == before


@contextmanager
def healthy(target: Target) -> Iterator[None]:
    """Health is asked for again and again, and each time there."""
    with HealthWatch(target.address) as watch:
        yield
    assert set(watch.statuses) <= {200}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_body_beyond_all_bounds_is_refused(target: Target, attack: str) -> None:
    send, expected = ATTACKS[attack]
    with healthy(target):
        assert send(target.address) == expected


def test_half_sent_requests_are_ended(target: Target) -> None:
    with healthy(target), hostile.half_sent(target.address, 200) as clients:
        assert greedy(target.address)
        for client in clients:
            while client.recv(65536):
                continue


def test_clients_that_leave_end_their_requests(target: Target) -> None:
    with healthy(target):
        assert hostile.leaving(target.address, 60).total() == 60
        until(target.is_idle)


def test_readers_that_stall_end_their_requests(target: Target) -> None:
    with healthy(target), hostile.stalled_readers(target.address, 2, num_outputs=10):
        assert greedy(target.address)
        until(target.is_idle)


def test_hundreds_of_malformed_requests(target: Target) -> None:
    draw = random.Random(7)
    statuses: Counter[int] = Counter()
    with healthy(target):
        for _ in range(300):
            statuses[hostile.send_malformed(target.address, hostile.malformed(draw))] += 1
    assert statuses[400] > 100
    assert statuses[200] > 5, "some are right by chance, or every answer would be one to the same fault"


def test_one_clients_prompts_do_not_stand_before_another_ones(real: Target) -> None:
    """Hundreds of prompts in one body are far from done when another client's only one is answered."""
    many = {"prompt": ["Once upon"] * 400, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    with ThreadPoolExecutor(1) as clients:
        answers = clients.submit(hostile.post, real.address, many)
        until(lambda: not real.is_idle())
        text = greedy(real.address)
        assert not answers.done()
        status, body = answers.result()
    assert status == 200
    assert [choice["text"] for choice in json.loads(body)["choices"]] == [text] * 400
