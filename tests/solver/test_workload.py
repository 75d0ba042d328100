"""Lengths of requests that are drawn from a workload."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solver.workload import Workload, draw_lengths

# Like lengths of chats: most short, some long, prompts and outputs of one request not alike.
LENGTHS = tuple((int(10 * 1.01**n), 1 + (n * 37) % 50) for n in range(300))
WORKLOAD = Workload(source="made up", lengths=LENGTHS)


def drawn(workload: Workload, count: int, *, seed: int) -> list[tuple[int, int]]:
    return list(itertools.islice(draw_lengths(workload, random.Random(seed)), count))


@pytest.mark.parametrize("seed", range(5))
def test_any_window_of_few_requests_has_about_the_mean_length(seed: int) -> None:
    lengths = drawn(WORKLOAD, 480, seed=seed)

    def off(window: Sequence[tuple[int, int]]) -> float:
        return abs(float(np.mean([sum(pair) for pair in window])) / (WORKLOAD.mean_kv_tokens) - 1)

    windows = [lengths[begin : begin + 64] for begin in range(0, 416, 7)]
    independent = random.Random(seed)
    assert max(map(off, windows)) < 0.08
    assert float(np.mean([off(window) for window in windows])) < 0.03
    assert float(np.mean([off([independent.choice(LENGTHS) for _ in range(64)]) for _ in range(99)])) > 0.04


@given(size=st.integers(1, 20), seed=st.integers(0, 9))
def test_each_length_comes_as_often_as_any_other(size: int, seed: int) -> None:
    counts = Counter(drawn(Workload(source="few", lengths=LENGTHS[:size]), 200 * size, seed=seed))
    assert set(counts) == set(LENGTHS[:size])
    assert max(counts.values()) - min(counts.values()) <= 20


def test_another_seed_gives_another_order_and_the_same_one_the_same() -> None:
    assert drawn(WORKLOAD, 64, seed=1) == drawn(WORKLOAD, 64, seed=1)
    assert drawn(WORKLOAD, 64, seed=1) != drawn(WORKLOAD, 64, seed=2)
