"""Samples of a grid: which block is measured next, which are kept, when there are enough. What runs comes from outside.

The unit of measurement is a block: iterations back to back for ``MIN_BLOCK_S``, its mean the sample. A block
is long enough to average over the periods in which a container's CPU quota is granted, where single iterations are
either fast or stalled and their median would be neither.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec
import numpy as np

from helixbench.profiler.cost.measured import CostSample
from helixbench.profiler.measure.grid import GridPoint, Runner

MIN_BLOCK_S = 0.12
MIN_BLOCK_ITERATIONS = 2
MIN_ROUNDS = 3
MAX_BLOCKS = 25
NOISE_TARGET = 0.01
"""``CostSample.noise`` below which a point is measured no further."""
WARM_UP_TOLERANCE = 0.05
MAX_WARM_UP_ITERATIONS = 30
MAX_RETRIES = 5

Disturbance: TypeAlias = Callable[[], Callable[[], str | None]]
"""Called when a block begins; what it returns is called at its end and names the measured cause that spoilt it."""


class Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One measured block: mean seconds of an iteration by the wall clock.

    ``deviation_s`` is the standard deviation of its single iterations. ``is_refined``: of a point that was added where
    the fit was worst. ``discarded`` are the blocks that were spoilt before this one stood, by the measured cause.
    """

    point: GridPoint
    mean_s: float
    deviation_s: float = 0.0
    is_refined: bool = False
    discarded: dict[str, int] = {}


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured; see ``Quality`` for ``drift`` and ``discarded``."""

    samples: tuple[CostSample, ...]
    blocks: tuple[Block, ...]
    drift: tuple[float, ...]
    discarded: dict[str, int]
    num_refined: int


class Sampler:
    """Measures points in rounds over the shuffled grid.

    Args:
        points: what to measure.
        runner: prepares a batch and gives the function that runs one iteration of it.
        seed: of the shuffling.
        taken: blocks of an earlier, interrupted run, which count.
        clock: monotonic seconds.
        disturbance: says whether a block is to be measured again, and why.
        on_block: told (blocks done, blocks expected) after each.
        on_round: given all blocks after each round, to be kept.
    """

    def __init__(
        self,
        points: Sequence[GridPoint],
        runner: Runner,
        *,
        seed: int,
        taken: Sequence[Block] = (),
        clock: Callable[[], float] = time.perf_counter,
        disturbance: Disturbance = lambda: lambda: None,
        on_block: Callable[[int, int], None] = lambda _done, _expected: None,
        on_round: Callable[[tuple[Block, ...]], None] = lambda _blocks: None,
    ) -> None:
        self._runner, self._clock, self._disturbance = runner, clock, disturbance
        self._on_block, self._on_round = on_block, on_round
        self._shuffle = random.Random(seed).shuffle
        self._blocks: dict[GridPoint, list[Block]] = {point: [] for point in points}  # point -> its blocks, in order
        self._took_s: dict[GridPoint, float] = {}  # point -> what its last block took, preparation included
        self._refined = {block.point for block in taken if block.is_refined}
        self._done = 0
        for block in taken:
            self._blocks.setdefault(block.point, []).append(block)

    def warm_up(self, point: GridPoint) -> int:
        """Run a batch until three iterations in a row take the same, or a cap; returns the iterations it took."""
        times: list[float] = []
        with self._runner(point) as iterate:
            while len(times) < MAX_WARM_UP_ITERATIONS and not _is_stable(times[-3:]):
                begin = self._clock()
                iterate()
                times.append(self._clock() - begin)
        return len(times)

    def measure(
        self,
        *,
        budget_s: float,
        refine: Callable[[Sequence[CostSample]], Sequence[GridPoint]] = lambda _: (),
    ) -> Sampled:
        """At least ``MIN_ROUNDS`` rounds whatever they take, for below that a spread says nothing; then what is noisy.

        Args:
            budget_s: seconds after which no further block begins.
            refine: given the samples so far, names the points to add where they are missed most.
        """
        deadline = self._clock() + budget_s
        self._rounds()
        while refined := [point for point in refine(self.samples()) if point not in self._blocks]:
            expected_s = MIN_ROUNDS * len(refined) * (sum(self._took_s.values()) / max(1, len(self._took_s)))
            if self._clock() + expected_s > deadline:
                break
            self._refined.update(refined)
            self._blocks.update({point: [] for point in refined})
            self._rounds()
        while self._noisy_round(deadline):
            continue
        return Sampled(
            samples=self.samples(),
            blocks=self.blocks(),
            drift=self.drift(),
            discarded=self._discarded(),
            num_refined=len(self._refined),
        )

    def blocks(self) -> tuple[Block, ...]:
        """All blocks that count."""
        return tuple(block for blocks in self._blocks.values() for block in blocks)

    @property
    def points(self) -> tuple[GridPoint, ...]:
        """What is measured, in the order of ``samples``."""
        return tuple(point for point, blocks in self._blocks.items() if blocks)

    def samples(self) -> tuple[CostSample, ...]:
        """Median and spread of each point's blocks."""
        return tuple(
            sample_of(point, blocks, is_refined=point in self._refined)
            for point, blocks in self._blocks.items()
            if blocks
        )

    def drift(self) -> tuple[float, ...]:
        """For each round after the first: the median over its points of their time over that of the first round."""
        longest = max((len(blocks) for blocks in self._blocks.values()), default=0)
        return tuple(
            float(np.median([b[number].mean_s / b[0].mean_s for b in self._blocks.values() if len(b) > number]))
            for number in range(1, longest)
        )

    def _discarded(self) -> dict[str, int]:
        """Cause -> blocks that it spoilt."""
        total: Counter[str] = Counter()
        for block in self.blocks():
            total.update(block.discarded)
        return dict(total)

    def _rounds(self) -> None:
        for number in range(MIN_ROUNDS):
            todo = [point for point, blocks in self._blocks.items() if len(blocks) <= number]
            expected = self._done + sum(max(0, MIN_ROUNDS - len(blocks)) for blocks in self._blocks.values())
            self._round(todo, expected)

    def _noisy_round(self, deadline: float) -> bool:
        """Once more each noisy point whose block still fits; whether there was one.

        Held-out ones twice: a fit averages over its points, while each of those is compared alone.
        """
        noisy = [
            point
            for point, blocks in self._blocks.items()
            for more in range(2 if point.held_out else 1)
            if len(blocks) + more < MAX_BLOCKS and sample_of(point, blocks).noise > NOISE_TARGET
        ]
        self._shuffle(noisy)
        chosen, end = [], self._clock()
        for point in noisy:
            if end + self._took_s.get(point, 0.0) < deadline:
                end += self._took_s.get(point, 0.0)
                chosen.append(point)
        self._round(chosen, self._done + len(chosen))
        return bool(chosen)

    def _round(self, points: list[GridPoint], expected: int) -> None:
        self._shuffle(points)
        for point in points:
            begin = self._clock()
            self._blocks[point].append(self._undisturbed_block(point))
            self._took_s[point] = self._clock() - begin
            self._done += 1
            self._on_block(self._done, expected)
        if points:
            self._on_round(self.blocks())

    def _undisturbed_block(self, point: GridPoint) -> Block:
        """A block without a measured disturbance; after ``MAX_RETRIES`` discarded ones the next stands as it is."""
        discarded: Counter[str] = Counter()
        for _ in range(MAX_RETRIES):
            cause_of = self._disturbance()
            block = self._block(point)
            cause = cause_of()
            if cause is None:
                break
            discarded[cause] += 1
        else:
            block = self._block(point)
        return msgspec.structs.replace(block, is_refined=point in self._refined, discarded=dict(discarded))

    def _block(self, point: GridPoint) -> Block:
        """The first iteration, which warms up, is not timed."""
        with self._runner(point) as iterate:
            iterate()
            took_s: list[float] = []
            while len(took_s) < MIN_BLOCK_ITERATIONS or sum(took_s) < MIN_BLOCK_S:
                begin = self._clock()
                iterate()
                took_s.append(self._clock() - begin)
        return Block(
            point=point,
            mean_s=statistics.fmean(took_s),
            deviation_s=statistics.stdev(took_s),
        )


def least_seconds(points: Sequence[GridPoint], *, first: tuple[float, float], second: tuple[float, float]) -> float:
    """About how long the first ``MIN_ROUNDS`` rounds take, from two iterations that were timed.

    Args:
        points: the grid.
        first: tokens and seconds of an iteration of a small batch on all layers; a line is drawn through both.
        second: those of a large batch.
    """
    slope = (second[1] - first[1]) / max(1.0, second[0] - first[0])
    most = max(point.num_layers for point in points)
    total = 0.0
    for point in points:
        share = max(point.num_layers, 1) / most
        iteration_s = max(1e-6, share * (first[1] + slope * (point.num_tokens - first[0])))
        iterations = max(MIN_BLOCK_ITERATIONS, int(MIN_BLOCK_S / iteration_s) + 1)
        total += MIN_ROUNDS * iteration_s * (1 + iterations)  # one more warms up
    return total


def sample_of(point: GridPoint, blocks: Sequence[Block], *, is_refined: bool = False) -> CostSample:
    """Median of a point's blocks, half their interquartile range over it, and how single iterations scatter."""
    means = [block.mean_s for block in blocks]
    low, median, high = (float(value) for value in np.percentile(means, (25, 50, 75)))
    within = statistics.fmean(block.deviation_s**2 for block in blocks)
    return CostSample(
        num_layers=point.num_layers,
        first=point.part == "embedding",
        last=point.part == "head",
        batch=point.shape,
        median_s=median,
        spread=(high - low) / 2 / median,
        variation=math.sqrt(within + statistics.pvariance(means)) / median,
        repeats=len(blocks),
        held_out=point.held_out,
        is_refined=is_refined,
    )


def _is_stable(times: Sequence[float]) -> bool:
    return len(times) == 3 and max(times) <= min(times) * (1 + WARM_UP_TOLERANCE)
