"""Lengths of requests that are drawn from a workload."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixbench.solver.problem.workload import Workload, draw_lengths

# Like lengths of chats: most short, some long, prompts and outputs of one request not alike.
LENGTHS = tuple((int(10 * 1.01**n), 1 + (n * 37) % 50) for n in range(300))
WORKLOAD = Workload(source="made up", lengths=LENGTHS)


def drawn(workload: Workload, count: int, *, seed: int) -> list[tuple[int, int]]:
    return list(itertools.islice(draw_lengths(workload, random.Random(seed)), count))


Lengths = Sequence[tuple[int, int]]


def tokens(window: Lengths) -> float:
    return sum(prompt + output for prompt, output in window) / len(window)


def outputs_to_prompt_tokens(window: Lengths) -> float:
    return sum(output for _, output in window) / sum(prompt for prompt, _ in window)


def spread(figure: Callable[[Lengths], float], windows: Sequence[Lengths]) -> float:
    """Root mean square of how far off a window is from all lengths together."""
    whole = figure(LENGTHS)
    return float(np.sqrt(np.mean([(figure(window) / whole - 1) ** 2 for window in windows])))


@pytest.mark.parametrize("figure", [tokens, outputs_to_prompt_tokens])
@pytest.mark.parametrize("seed", range(3))
def test_any_window_of_few_requests_is_about_as_the_whole(figure: Callable[[Lengths], float], seed: int) -> None:
    lengths = drawn(WORKLOAD, 900, seed=seed)
    rng = random.Random(seed)
    windows = [lengths[begin : begin + 60] for begin in range(0, 840, 7)]
    independent = [[rng.choice(LENGTHS) for _ in range(60)] for _ in range(99)]
    assert spread(figure, windows) < min(0.03, spread(figure, independent) / 3)


def test_a_window_is_as_various_as_the_whole() -> None:
    window = drawn(WORKLOAD, 300, seed=1)[100:200]
    assert np.std([prompt for prompt, _ in window]) == pytest.approx(np.std([prompt for prompt, _ in LENGTHS]), rel=0.1)
    assert np.std([output for _, output in window]) == pytest.approx(np.std([out for _, out in LENGTHS]), rel=0.1)


@given(size=st.integers(1, 20), seed=st.integers(0, 9))
def test_each_length_comes_as_often_as_any_other(size: int, seed: int) -> None:
    counts = Counter(drawn(Workload(source="few", lengths=LENGTHS[:size]), 200 * size, seed=seed))
    assert set(counts) == set(LENGTHS[:size])
    assert max(counts.values()) <= 200 + 1 + size // 2
    assert min(counts.values()) >= 200 - size // 2


@pytest.mark.parametrize("size", [2, 4, 300])
def test_another_seed_gives_another_order_and_the_same_one_the_same(size: int) -> None:
    workload = Workload(source="some", lengths=LENGTHS[:size])
    assert drawn(workload, 64, seed=1) == drawn(workload, 64, seed=1)
    assert drawn(workload, 64, seed=1) != drawn(workload, 64, seed=2)


def test_few_lengths_all_come_soon() -> None:
    four = ((5, 9), (30, 4), (12, 1), (1, 17))
    assert set(drawn(Workload(source="four", lengths=four), 8, seed=3)) == set(four)
