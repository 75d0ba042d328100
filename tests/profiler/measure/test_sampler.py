"""Sampling on a node with a clock of its own: what is measured next, what is kept, when it is enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from helixbench.profiler.cost.measured import CostSample
from helixbench.profiler.measure.grid import GridPoint, Iterate
from helixbench.profiler.measure.sampler import (
    MAX_BLOCKS,
    MAX_RETRIES,
    MIN_BLOCK_ITERATIONS,
    MIN_BLOCK_S,
    MIN_ROUNDS,
    Block,
    Sampled,
    Sampler,
    sample_of,
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


def measured(node: Node, wanted: Sequence[GridPoint], *, budget_s: float = 0.0, seed: int = 0) -> Sampled:
    return Sampler(wanted, node.run, seed=seed, clock=node.clock).measure(budget_s=budget_s)


def test_medians_and_spreads_are_those_of_the_blocks() -> None:
    first, second = points(2)
    samples = measured(Node({first: [0.02, 0.05, 0.03], second: [0.2]}), (first, second)).samples

    assert [sample.batch.decode_tokens for sample in samples] == [1, 2]
    assert samples[0].median_s == pytest.approx(0.03)
    assert samples[0].spread == pytest.approx((0.04 - 0.025) / 2 / 0.03), "half the interquartile range, relative"
    assert samples[1].median_s == pytest.approx(0.2)
    assert samples[1].spread == pytest.approx(0)
    assert [sample.repeats for sample in samples] == [MIN_ROUNDS, MIN_ROUNDS]


def test_the_variation_of_a_sample_is_that_of_all_its_iterations() -> None:
    """Within a block, and from block to block."""
    (point,) = points(1)
    even = sample_of(point, [Block(point=point, mean_s=mean_s, deviation_s=0.0) for mean_s in (0.9, 1.0, 1.1)])
    both = sample_of(point, [Block(point=point, mean_s=mean_s, deviation_s=0.3) for mean_s in (0.9, 1.0, 1.1)])
    assert even.variation == pytest.approx((0.02 / 3) ** 0.5)
    assert both.variation == pytest.approx((0.09 + 0.02 / 3) ** 0.5)


@pytest.mark.parametrize(("iteration_s", "iterations"), [(0.001, 120), (0.04, 3), (7.0, MIN_BLOCK_ITERATIONS)])
def test_a_block_is_long_enough_and_its_first_iteration_is_not_timed(iteration_s: float, iterations: int) -> None:
    (point,) = points(1)
    node = Node({point: [iteration_s]})

    (sample,) = measured(node, (point,)).samples

    assert sample.median_s == pytest.approx(iteration_s)
    for count in node.iterations.values():
        assert count == pytest.approx(1 + iterations, abs=1)  # adding up times in floats may take one more
        assert (count - 1) * iteration_s >= MIN_BLOCK_S - 1e-9


def test_blocks_that_agree_by_chance_do_not_hide_how_iterations_scatter() -> None:
    (point,) = points(1)
    blocks = [Block(point=point, mean_s=0.1, deviation_s=0.02) for _ in range(8)]
    assert sample_of(point, blocks).noise == pytest.approx(0.2 / 4)
    assert sample_of(point, blocks[:2]).noise == pytest.approx(0.2 / 2)
    apart = [*blocks[:4], *(Block(point=point, mean_s=0.3) for _ in range(4))]
    assert sample_of(point, apart).noise == sample_of(point, apart).spread == pytest.approx(0.5)


def test_what_is_quiet_is_measured_no_further_and_what_is_noisy_is_until_the_budget_ends() -> None:
    quiet, noisy = points(2)
    node = Node({quiet: [0.1], noisy: [0.1, 0.2, 0.15]})
    block_s = Node.WARM_UP_S + MIN_BLOCK_ITERATIONS * 0.1

    samples = measured(node, (quiet, noisy), budget_s=(2 * MIN_ROUNDS + 4) * block_s).samples

    assert samples[0].repeats == MIN_ROUNDS
    assert MIN_ROUNDS < samples[1].repeats <= MIN_ROUNDS + 4


def test_of_what_is_noisy_held_out_points_are_measured_twice_as_often() -> None:
    fitted = points(1)[0]
    held_out = msgspec.structs.replace(fitted, held_out=True)
    node = Node({point: [0.1, 0.2, 0.15] * 10 for point in (fitted, held_out)})
    block_s = Node.WARM_UP_S + MIN_BLOCK_ITERATIONS * 0.15

    samples = measured(node, (fitted, held_out), budget_s=(2 * MIN_ROUNDS + 9.5) * block_s).samples

    assert [sample.repeats for sample in samples] == [MIN_ROUNDS + 3, MIN_ROUNDS + 6]


@pytest.mark.parametrize("held_out", [False, True])
def test_noise_that_does_not_end_is_measured_up_to_a_cap(held_out: bool) -> None:
    point = msgspec.structs.replace(points(1)[0], held_out=held_out)
    node = Node({point: [0.1 * (1 + number % 3) for number in range(100)]})
    assert measured(node, (point,), budget_s=1e9).samples[0].repeats == MAX_BLOCKS


def test_every_round_has_every_point_in_an_order_of_its_own() -> None:
    many = points(12)
    orders = []
    for seed in (1, 1, 2):
        node = Node({point: [0.1] for point in many})
        measured(node, many, seed=seed)
        rounds = [node.blocks[start : start + 12] for start in range(0, len(node.blocks), 12)]
        assert all(sorted(blocks, key=many.index) == list(many) for blocks in rounds)
        assert len({tuple(blocks) for blocks in rounds}) == MIN_ROUNDS
        orders.append(node.blocks)
    assert orders[0] == orders[1] != orders[2]


def test_drift_is_the_median_of_each_round_over_the_first() -> None:
    many = points(3)
    node = Node({point: [0.2, 0.22, 0.3] for point in many[:2]} | {many[2]: [0.2]})
    assert measured(node, many).drift == pytest.approx((1.1, 1.5))


def test_a_disturbed_block_is_measured_again_and_counted() -> None:
    (point,) = points(1)
    node = Node({point: [9.0, 0.1]})

    def disturbance() -> Callable[[], str | None]:
        number = len(node.blocks)
        return lambda: "steal" if number == 0 else None

    sampled = Sampler((point,), node.run, seed=0, clock=node.clock, disturbance=disturbance).measure(budget_s=0)

    assert sampled.discarded == {"steal": 1}
    assert [block.mean_s for block in sampled.blocks] == pytest.approx([0.1] * MIN_ROUNDS)


def test_a_disturbance_that_stays_does_not_hold_it_up() -> None:
    (point,) = points(1)
    node = Node({point: [0.1]})
    sampler = Sampler((point,), node.run, seed=0, clock=node.clock, disturbance=lambda: lambda: "hot")
    assert sampler.measure(budget_s=0).discarded == {"hot": MAX_RETRIES * MIN_ROUNDS}


def test_an_interrupted_run_goes_on_where_it_was() -> None:
    many = points(5)
    kept: list[tuple[Block, ...]] = []

    class Stop(Exception):  # noqa: N818
        pass

    def stop_in_round_two(done: int, _: int) -> None:
        if done == 8:
            raise Stop

    first = Node({point: [0.1] for point in many})
    with pytest.raises(Stop):
        Sampler(many, first.run, seed=0, clock=first.clock, on_block=stop_in_round_two, on_round=kept.append).measure(
            budget_s=0
        )
    assert len(kept) == 1
    assert len(kept[0]) == 5

    second = Node({point: [0.1] for point in many})
    sampled = Sampler(many, second.run, seed=0, clock=second.clock, taken=kept[0]).measure(budget_s=0)

    assert len(second.blocks) == 5 * (MIN_ROUNDS - 1)
    assert [sample.repeats for sample in sampled.samples] == [MIN_ROUNDS] * 5


def test_what_was_refined_and_what_was_discarded_is_gone_on_with() -> None:
    first, second = points(2)
    kept: list[tuple[Block, ...]] = []
    causes = iter(["hot", "hot", None, "steal"])

    def measured_by(node: Node, **more: Any) -> Sampled:
        sampler = Sampler((first,), node.run, seed=0, clock=node.clock, **more)
        return sampler.measure(budget_s=1e9, refine=lambda samples: (second,) if len(samples) == 1 else ())

    whole = measured_by(
        Node({first: [0.1], second: [0.1]}),
        disturbance=lambda: lambda: next(causes, None),
        on_round=kept.append,
    )
    assert (whole.num_refined, whole.discarded) == (1, {"hot": 2, "steal": 1})

    gone_on = Node({first: [0.1], second: [0.1]})
    sampled = measured_by(gone_on, taken=kept[MIN_ROUNDS])

    assert gone_on.blocks == [second] * (MIN_ROUNDS - 1)
    assert (sampled.num_refined, sampled.discarded) == (1, {"hot": 2, "steal": 1})
    assert [sample.is_refined for sample in sampled.samples] == [False, True]


def test_progress_counts_up_to_what_it_said() -> None:
    many = points(4)
    told: list[tuple[int, int]] = []
    node = Node({point: [0.1] for point in many})
    Sampler(many, node.run, seed=0, clock=node.clock, on_block=lambda *at: told.append(at)).measure(budget_s=0)
    assert told == [(n, 4 * MIN_ROUNDS) for n in range(1, 4 * MIN_ROUNDS + 1)]


def test_points_that_are_asked_for_are_added_and_marked() -> None:
    first, second = points(2)
    node = Node({first: [0.1], second: [0.1]})

    def refine(samples: Sequence[CostSample]) -> Sequence[GridPoint]:
        return (second,) if len(samples) == 1 else ()

    sampled = Sampler((first,), node.run, seed=0, clock=node.clock).measure(budget_s=1e9, refine=refine)

    assert sampled.num_refined == 1
    assert [(sample.is_refined, sample.repeats) for sample in sampled.samples] == [(False, 3), (True, 3)]


def test_no_point_is_added_where_the_budget_has_gone() -> None:
    first, second = points(2)
    node = Node({first: [0.1], second: [0.1]})
    sampled = Sampler((first,), node.run, seed=0, clock=node.clock).measure(budget_s=0, refine=lambda _: (second,))
    assert sampled.num_refined == 0


@pytest.mark.parametrize(
    ("times", "iterations"), [([1.0, 0.5, 0.3, 0.2], 6), ([0.1 * (1 + n % 2) for n in range(99)], 30)]
)
def test_warm_up_ends_when_times_are_stable_or_at_a_cap(times: list[float], iterations: int) -> None:
    (point,) = points(1)
    now, ran = [0.0], [0]

    @contextmanager
    def run(_: GridPoint) -> Iterator[Iterate]:
        def iterate() -> None:
            now[0] += times[min(ran[0], len(times) - 1)]
            ran[0] += 1

        yield iterate

    assert Sampler((point,), run, seed=0, clock=lambda: now[0]).warm_up(point) == iterations
