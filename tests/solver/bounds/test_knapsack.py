"""The knapsack against every combination; its two ways to round."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from helixbench.solver.bounds.knapsack import Group, cells_down, cells_up, cheapest

CELLS = 40


def groups_from(seed: int) -> list[Group]:
    rng = random.Random(seed)
    return [
        Group(
            rng.randint(1, 3),
            np.array([rng.randint(0, 30) for _ in range(3)]),
            np.array([rng.uniform(0.1, 2) for _ in range(3)]),
        )
        for _ in range(rng.randint(1, 3))
    ]


def least_cost(groups: list[Group], cells: int) -> float:
    """Over all ways to take up to ``count`` pieces of each group."""
    ways = [
        [picks for n in range(g.count + 1) for picks in itertools.combinations_with_replacement(range(3), n)]
        for g in groups
    ]
    costs = [
        sum(float(g.costs[o]) for g, picks in zip(groups, taken, strict=True) for o in picks)
        for taken in itertools.product(*ways)
        if sum(int(g.weights[o]) for g, picks in zip(groups, taken, strict=True) for o in picks) >= cells
    ]
    return min(costs, default=float("inf"))


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_cheapest_of_all_combinations(seed: int) -> None:
    groups = groups_from(seed)
    solved = cheapest(groups, CELLS)
    for cells in (1, 17, CELLS):
        assert solved.cost[cells] == pytest.approx(least_cost(groups, cells))
        if np.isfinite(solved.cost[cells]):
            picks = solved.picks(cells)
            assert sum(int(groups[g].weights[o]) for g, o in picks) >= cells
            assert sum(float(groups[g].costs[o]) for g, o in picks) == pytest.approx(solved.cost[cells])


@pytest.mark.parametrize("seed", range(50))
def test_rounding_up_keeps_every_set_that_is_enough_and_down_admits_no_other(seed: int) -> None:
    rng = random.Random(seed)
    target = rng.uniform(1, 1e4)
    capacities = np.array([rng.choice([target, target / 2, target / 3, rng.uniform(0, target)]) for _ in range(4)])
    up, down = cells_up(capacities, target, CELLS), cells_down(capacities, target, CELLS)
    for size in range(1, 5):
        for chosen in itertools.combinations(range(4), size):
            total = float(capacities[list(chosen)].sum())
            if total >= target and all(capacities[i] > 0 for i in chosen):
                assert up[list(chosen)].sum() >= CELLS
            if down[list(chosen)].sum() >= CELLS:
                assert total >= target * (1 - 1e-9)


def test_what_is_short_of_the_target_alone_never_weighs_all_of_it() -> None:
    assert cells_up(np.array([0.9999999, 1.0]), 1.0, CELLS).tolist() == [CELLS - 1, CELLS]
