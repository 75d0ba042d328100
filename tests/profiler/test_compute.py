from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.compute import (
    MIN_BLOCK_ITERATIONS,
    MIN_BLOCK_S,
    MIN_ROUNDS,
    GridPoint,
    Iterate,
    grid,
    layer_counts_to_measure,
    measure_grid,
)


class Node:
    """A node on a clock of its own: an iteration takes what ``times_s`` says, the first one of a block much longer."""

    WARM_UP_S = 5.0

    def __init__(self, times_s: dict[GridPoint, list[float]]) -> None:
        self.now_s = 100.0
        self._times_s = times_s  # point -> seconds of an iteration in each of its blocks
        self.blocks: list[GridPoint] = []
        self.iterations: Counter[int] = Counter()  # block -> iterations, the first one included
        self._is_open = False

    def clock(self) -> float:
        return self.now_s

    @contextmanager
    def run(self, point: GridPoint) -> Iterator[Iterate]:
        assert not self._is_open, "two batches at once"
        self._is_open = True
        block = len(self.blocks)
        times = self._times_s[point]
        time_s = times[min(self.blocks.count(point), len(times) - 1)]
        self.blocks.append(point)

        def iterate() -> None:
            self.now_s += time_s if self.iterations[block] else self.WARM_UP_S
            self.iterations[block] += 1

        yield iterate
        self._is_open = False


def points(count: int) -> tuple[GridPoint, ...]:
    return tuple(GridPoint(part="layers", num_layers=4, decodes=(16,) * (n + 1)) for n in range(count))


def test_medians_and_spreads_are_those_of_the_blocks() -> None:
    first, second = points(2)
    node = Node({first: [0.02, 0.05, 0.03], second: [0.2]})

    samples = measure_grid((first, second), node.run, budget_s=0.0, seed=0, clock=node.clock)

    assert [sample.batch.decode_tokens for sample in samples] == [1, 2]
    assert samples[0].median_s == pytest.approx(0.03)
    assert samples[0].spread == pytest.approx((0.04 - 0.025) / 2 / 0.03), "half the interquartile range, relative"
    assert samples[1].median_s == pytest.approx(0.2)
    assert samples[1].spread == pytest.approx(0)
    assert [sample.repeats for sample in samples] == [MIN_ROUNDS, MIN_ROUNDS]


@pytest.mark.parametrize(("iteration_s", "iterations"), [(0.001, 120), (0.04, 3), (7.0, MIN_BLOCK_ITERATIONS)])
def test_a_block_is_long_enough_and_its_first_iteration_is_not_timed(iteration_s: float, iterations: int) -> None:
    (point,) = points(1)
    node = Node({point: [iteration_s]})

    (sample,) = measure_grid((point,), node.run, budget_s=0.0, seed=0, clock=node.clock)

    assert sample.median_s == pytest.approx(iteration_s)
    for count in node.iterations.values():
        assert count == pytest.approx(1 + iterations, abs=1)  # adding up times in floats may take one more
        assert count - 1 >= MIN_BLOCK_ITERATIONS
        assert (count - 1) * iteration_s >= MIN_BLOCK_S - 1e-9


@pytest.mark.parametrize(
    ("budget_rounds", "rounds"),
    [(0.0, MIN_ROUNDS), (0.1, MIN_ROUNDS), (MIN_ROUNDS + 0.5, MIN_ROUNDS), (MIN_ROUNDS + 3.5, MIN_ROUNDS + 3)],
)
def test_rounds_go_on_while_another_one_fits_the_budget(budget_rounds: float, rounds: int) -> None:
    both = points(2)
    node = Node({point: [0.1] for point in both})
    round_s = 2 * (Node.WARM_UP_S + MIN_BLOCK_ITERATIONS * 0.1)

    samples = measure_grid(both, node.run, budget_s=budget_rounds * round_s, seed=0, clock=node.clock)

    assert [sample.repeats for sample in samples] == [rounds, rounds]
    assert node.now_s - 100 == pytest.approx(rounds * round_s)


def test_every_round_has_every_point_in_an_order_of_its_own() -> None:
    many = points(12)
    orders = []
    for seed in (1, 1, 2):
        node = Node({point: [0.1] for point in many})
        measure_grid(many, node.run, budget_s=0.0, seed=seed, clock=node.clock)
        rounds = [node.blocks[start : start + 12] for start in range(0, len(node.blocks), 12)]
        assert all(sorted(blocks, key=many.index) == list(many) for blocks in rounds)
        assert len({tuple(blocks) for blocks in rounds}) == MIN_ROUNDS
        orders.append(node.blocks)
    assert orders[0] == orders[1] != orders[2]


def test_progress_counts_up_to_what_it_said() -> None:
    both = points(2)
    told: list[tuple[int, int]] = []
    node = Node({point: [0.1] for point in both})

    measure_grid(
        both,
        node.run,
        budget_s=53.5,
        seed=0,
        clock=node.clock,
        on_progress=lambda done, total: told.append((done, total)),
    )

    assert [done for done, _ in told] == list(range(1, len(node.blocks) + 1))
    assert all(done <= total for done, total in told)
    assert told[0][1] == MIN_ROUNDS * 2
    assert told[-1][0] == told[-1][1] == len(node.blocks) > MIN_ROUNDS * 2


# The grid

FULL = {"layer_counts": (4, 8), "max_batch_tokens": 128, "max_context_tokens": 512}


@given(
    max_batch_tokens=st.integers(8, 4096),
    max_context_tokens=st.integers(32, 8192),
    max_kv_tokens=st.integers(1024, 100_000),
    layers=st.sets(st.integers(1, 80), min_size=1, max_size=2),
)
def test_grid_points_can_be_run_and_stand_once(
    max_batch_tokens: int, max_context_tokens: int, max_kv_tokens: int, layers: set[int]
) -> None:
    made = grid(
        layer_counts=tuple(sorted(layers)),
        max_batch_tokens=max_batch_tokens,
        max_context_tokens=max_context_tokens,
        max_kv_tokens=max_kv_tokens,
    )
    assert len(set(made)) == len(made)
    for point in made:
        assert 0 < point.num_tokens <= max_batch_tokens
        assert point.kv_tokens <= max_kv_tokens
        assert all(past >= 0 and new > 0 for past, new in point.prefills)
        assert min(point.decodes, default=0) >= 0
        assert (point.num_layers == 0) == (point.part != "layers")
    assert {point.part for point in made} == {"layers", "embedding", "head"}
    assert {point.num_layers for point in made if point.part == "layers"} == layers
    assert max(point.num_tokens for point in made) == max_batch_tokens or max_kv_tokens < max_batch_tokens


def test_grid_covers_each_quantity_in_the_fit_and_mixes_out_of_it() -> None:
    made = grid(**FULL, max_kv_tokens=100_000)  # type: ignore[arg-type]
    fitted = [point for point in made if not point.held_out and point.part == "layers"]
    held_out = [point for point in made if point.held_out]

    assert {point.num_layers for point in held_out} == {4, 8}
    assert {point.shape for point in held_out}.isdisjoint(point.shape for point in fitted)
    assert any(point.prefills and point.decodes for point in fitted)
    assert any(point.prefills and point.decodes for point in held_out)
    assert any(past for point in fitted for past, _ in point.prefills), "a chunk that reads what is cached"
    assert max(past for point in fitted for past in point.decodes) == 512
    assert {1, 128} <= {len(point.decodes) for point in fitted}


def test_a_node_with_little_room_for_kv_is_measured_on_less() -> None:
    little = grid(**FULL, max_kv_tokens=1024)  # type: ignore[arg-type]
    much = grid(**FULL, max_kv_tokens=100_000)  # type: ignore[arg-type]
    assert set(little) < set(much)
    assert any(point.held_out for point in little)


def test_shape_of_a_batch() -> None:
    shape = GridPoint(part="layers", num_layers=2, prefills=((10, 4), (0, 3)), decodes=(20, 30, 0)).shape

    assert shape.prefill_tokens == 7
    assert shape.prefill_chunks == 2
    # token k of a chunk sees what is cached, those before it and itself
    assert shape.prefill_pairs == sum(10 + k for k in range(1, 5)) + sum(range(1, 4))
    assert shape.decode_tokens == 3
    assert shape.decode_context_tokens == 21 + 31 + 1
    assert shape.sampled_tokens == 5


@pytest.mark.parametrize(("max_layers", "counts"), [(1, (1,)), (2, (1, 2)), (3, (2, 3)), (14, (7, 14))])
def test_layer_counts_are_half_and_all(max_layers: int, counts: tuple[int, ...]) -> None:
    assert layer_counts_to_measure(max_layers) == counts
