"""The hash stage gives what the reference gives, however the tokens are batched, cut and entered."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixbench.errors import InputError
from helixbench.profiler.model.hash_model import HashModel
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.hash_stage import HashStage
from tests.hash_models import expected_tokens, make_small

NUM_LAYERS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HashModel:
    return make_small(tmp_path_factory.mktemp("hash"))


def stage(model: HashModel, start: int = 0, end: int = NUM_LAYERS, *, capacity: int = 400) -> HashStage:
    return HashStage(model, start=start, end=end, kv_capacity_tokens=capacity, dtype="float32")


class Pipeline:
    """Stages that tokens pass one after the other, each entered where the one before it ends."""

    def __init__(self, stages: list[HashStage]) -> None:
        self.stages = stages

    def reserve(self, request: int, length: int) -> None:
        for one in self.stages:
            one.kv.reserve(request, length)

    def release(self, request: int) -> None:
        for one in self.stages:
            one.kv.release(request)

    def run(self, parts: list[tuple[int, int, list[int]]]) -> dict[int, int]:
        """Tokens after the last part of each request; a part is (request, past, new token ids)."""
        items = [
            StageItem(request, past, len(ids), 0, True, np.array(ids, dtype=np.int32)) for request, past, ids in parts
        ]
        layer = 0
        for one in self.stages:
            output = one.forward(items)
            layer = one.end
            ends = np.cumsum([item.num_tokens for item in output.items])
            words = np.split(output.words, ends[:-1])
            items = [
                StageItem(item.request, item.past, item.num_tokens, layer, True, word)
                for item, word in zip(output.items, words, strict=True)
            ]
        last = {item.request: item for item in sorted(items, key=lambda item: item.past)}
        return {request: self.stages[-1].tokens(item.inputs[-1:])[0] for request, item in last.items()}


def late_entries(model: HashModel) -> Pipeline:
    """Ranges that overlap: the second and third stage are entered later than where they start."""
    return Pipeline([stage(model, 0, 3), stage(model, 1, 5), stage(model, 2, 6)])


@given(seed=st.integers(0, 10_000), cuts=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_any_batching_gives_the_references_tokens(model: HashModel, seed: int, cuts: int) -> None:
    """Prompts in chunks of mixed sizes beside decodes, several chunks of a request in one batch, extents that move."""
    draw = random.Random(seed)
    pipeline = late_entries(model)
    waiting = {
        n: ([draw.randrange(1000) for _ in range(draw.randrange(1, 40))], draw.randrange(1, 12)) for n in range(12)
    }
    expected = {n: expected_tokens(model, *request) for n, request in waiting.items()}
    running: dict[int, list[int]] = {}  # request -> its tokens so far
    cached: dict[int, int] = {}  # request -> tokens that have run
    served: dict[int, list[int]] = {}
    while waiting or running:
        for number in list(waiting):
            length = len(waiting[number][0]) + waiting[number][1]
            if length <= 100 - sum(len(waiting_of) for waiting_of in running.values()) and len(running) < 4:
                pipeline.reserve(number, length)
                running[number], cached[number], served[number] = list(waiting.pop(number)[0]), 0, []
        parts = []
        for number, tokens in running.items():
            for _ in range(draw.randrange(1, 3)):
                size = min(draw.randrange(1, cuts + 1), len(tokens) - cached[number])
                if size:
                    parts.append((number, cached[number], tokens[cached[number] : cached[number] + size]))
                    cached[number] += size
        for number, token in pipeline.run(parts).items():
            if cached[number] == len(running[number]):
                served[number].append(token)
                running[number].append(token)
                if len(served[number]) == len(expected[number]):
                    pipeline.release(number)
                    del running[number]
    assert served == expected


def test_sequences_that_enter_at_different_layers_share_a_batch(model: HashModel) -> None:
    """Request 0 passes [0,2) elsewhere, request 1 [0,4): both then run in one batch of a stage that holds [1,6)."""
    prompts = {0: [3, 1, 4, 1], 1: [5, 9, 2]}
    shared = stage(model, 1, NUM_LAYERS)
    items = []
    for (request, prompt), until in zip(prompts.items(), (2, 4), strict=True):
        before = stage(model, 0, until)
        before.kv.reserve(request, 10)
        shared.kv.reserve(request, 10)
        words = before.forward([StageItem(request, 0, len(prompt), 0, True, np.array(prompt))]).words
        items.append(StageItem(request, 0, len(prompt), until, True, words))
    output = shared.forward(items[::-1])
    ends = np.cumsum([item.num_tokens for item in output.items])
    tokens = shared.tokens(output.words[ends - 1])
    assert dict(zip([item.request for item in output.items], tokens, strict=True)) == {
        request: expected_tokens(model, prompt, 1)[0] for request, prompt in prompts.items()
    }


def decode_after(model: HashModel, spoil: str) -> tuple[int, int]:
    """The token after 20 cached ones, as served where the cache was spoiled, and as it should be."""
    tokens = [draw * 37 % 1000 for draw in range(21)]
    one = Pipeline([stage(model)])
    one.reserve(1, 30)
    one.reserve(2, 30)
    one.run([(1, 0, tokens[:20]), (2, 0, tokens[1:20])])
    sums = one.stages[0].kv.sums
    if spoil == "missing":
        sums[19] = 0
    elif spoil == "stale":
        sums[19] = sums[30 + 18]
    elif spoil == "swapped":
        sums[[18, 19]] = sums[[19, 18]]
    elif spoil == "repeated":
        sums[19] = sums[18]
    elif spoil == "one layer":
        sums[19, 3] += 1
    return one.run([(1, 20, tokens[20:])])[1], expected_tokens(model, tokens, 1)[0]


@pytest.mark.parametrize("spoil", ["missing", "stale", "swapped", "repeated", "one layer"])
def test_a_spoiled_cache_entry_changes_the_next_token(model: HashModel, spoil: str) -> None:
    served, expected = decode_after(model, spoil)
    assert served != expected


def test_the_cache_that_was_not_spoiled_does_not(model: HashModel) -> None:
    served, expected = decode_after(model, "")
    assert served == expected


def test_entries_that_were_read_long_ago_are_read_again(model: HashModel) -> None:
    """An extent that moved without its first entries shows within its output."""
    prompt = list(range(40))
    one = Pipeline([stage(model)])
    one.reserve(1, 100)
    output = [one.run([(1, 0, prompt)])[1]]
    one.stages[0].kv.sums[:20] = 0
    while len(output) < 40:
        output.append(one.run([(1, len(prompt) + len(output) - 1, output[-1:])])[1])
    assert output != expected_tokens(model, prompt, 40)


def test_a_range_that_the_model_does_not_have_is_refused(model: HashModel) -> None:
    with pytest.raises(InputError, match=r"layer range \[4,7\)"):
        stage(model, 4, 7)


def test_weights_are_those_that_the_model_would_have(model: HashModel) -> None:
    assert stage(model, 0, 3).weight_bytes == model.range_bytes(0, 3, dtype="float32")
