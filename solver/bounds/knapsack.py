"""The cheapest set of pieces whose capacities add up to a target: a knapsack by dynamic programming on a grid.

Both the bound (which sets of nodes can hold one layer?) and the search (which nodes make a stage?) ask this. Rounding
capacities up to the grid makes it a relaxation, which a bound needs; rounding down makes its answer fit to use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helixbench.solver.problem.arrays import FloatArray, IntArray

ROUNDING = 1e-12
"""Relative; far less than a cell, so that sums of whole cells come out right in spite of it."""


@dataclass(frozen=True)
class Group:
    """Pieces of which at most ``count`` are taken, each as one of several options of a weight, in cells, and a cost."""

    count: int
    weights: IntArray
    costs: FloatArray


@dataclass(frozen=True)
class Cheapest:
    """``cost[w]`` is the least cost of pieces that weigh at least ``w`` cells; ``picks`` lists them."""

    cost: FloatArray
    _taken: tuple[tuple[int, IntArray, NDArray[np.int16]], ...]  # (group, weights, option taken at each cell or -1)

    def picks(self, cells: int) -> list[tuple[int, int]]:
        """(group, option) of each piece in the cheapest set that weighs at least so many cells."""
        found = []
        for group, weights, taken in reversed(self._taken):
            option = int(taken[cells])
            if option >= 0:
                found.append((group, option))
                cells = max(0, cells - int(weights[option]))
        return found


def cells_up(capacities: FloatArray, target: float, cells: int) -> IntArray:
    """Capacities in cells of ``target / cells``, rounded so that what adds up to the target does so in cells too.

    What is short of the target by itself never weighs all of it: whatever makes up the rest weighs at least one cell.
    """
    rounded = np.ceil(np.minimum(capacities / target, 1.0) * cells * (1 - ROUNDING))
    return np.where(capacities >= target, cells, np.clip(rounded, 1, cells - 1)).astype(np.int64)


def cells_down(capacities: FloatArray, target: float, cells: int) -> IntArray:
    """Capacities in cells of ``target / cells``, rounded so that what adds up to the target in cells really does."""
    return np.floor(np.minimum(capacities / target, 1.0) * cells * (1 + ROUNDING)).astype(np.int64)


def cheapest(groups: Sequence[Group], cells: int) -> Cheapest:
    """Solve for every weight from 0 to ``cells`` at once."""
    cost = np.full(cells + 1, np.inf)
    cost[0] = 0.0
    history: list[tuple[int, IntArray, NDArray[np.int16]]] = []
    for number, group in enumerate(groups):
        usable = [option for option in range(len(group.weights)) if group.weights[option] > 0]
        most = max((-(-cells // int(group.weights[option])) for option in usable), default=0)
        for _ in range(min(group.count, most)):
            better, taken = _one_more(cost, group, usable)
            if not (taken >= 0).any():
                break
            history.append((number, group.weights, taken))
            cost = better
    return Cheapest(cost, tuple(history))


def _one_more(cost: FloatArray, group: Group, usable: Sequence[int]) -> tuple[FloatArray, NDArray[np.int16]]:
    """Costs with at most one more piece of the group, and the option taken at each cell."""
    better, taken = cost.copy(), np.full(len(cost), -1, dtype=np.int16)
    for option in usable:
        weight, price = int(group.weights[option]), group.costs[option]
        with_it = np.empty_like(cost)
        with_it[:weight] = price
        with_it[weight:] = cost[: len(cost) - weight] + price
        improves = with_it < better
        better[improves] = with_it[improves]
        taken[improves] = option
    return better, taken
