"""An upper bound on the max-flow from what single layers need: no layer can be held by half a node.

At a flow ``F`` every layer is held by a *configuration*: nodes, each with some number of layers, whose capacities add
up to at least ``F``. A node that holds ``k`` layers takes part in the configurations of ``k`` layers. Whether
configurations of the nodes at hand suffice for all layers is a linear program with a column for each configuration, as
for cutting stock (Gilmore and Gomory, 1961); the columns are found as needed, by a knapsack over the program's prices.

Prices alone prove that a flow is too much: if every configuration costs at least ``c`` and all nodes together are worth
less than ``c * L``, no placement carries it. So nothing rests on the linear program's tolerances. Left out are where
layers lie and all links; every placement's max-flow is at most this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from helixbench.solver.bounds.knapsack import Group, cells_up, cheapest
from helixbench.solver.bounds.work import Workers, best_rates
from helixbench.solver.flow.highs import load_highspy
from helixbench.solver.problem.arrays import FloatArray
from helixbench.solver.problem.capacity import Capacities

STAGES = ((500, 1e-3), (4000, 2e-5))
"""(cells of the knapsack, relative width of the bisection), coarse before fine."""

MOST_COLUMNS = 400
"""At each flow. Beyond that the flow counts as not excluded."""

SURELY = 1e-9
"""Relative. Prices exclude a flow only by more than rounding could."""


@dataclass(frozen=True)
class _Pieces:
    """So many nodes of one kind, which carry ``tokens_per_s[k - 1]`` where they hold ``k`` layers (0: they cannot)."""

    count: int
    tokens_per_s: FloatArray


Picks = tuple[tuple[int, int], ...]
"""A configuration: (group, index of length) of each piece in it, sorted."""


class Configurations:
    """Flows excluded by configurations of a cluster's nodes; configurations found are kept for the next flow.

    Nodes whose time is shared by entries of different cost (measured cost with partial inference) can do different
    amounts at each of their layers; they take part as a quantity of work, as in ``bounds.work_bound``.

    Of the nodes in ``names`` only, where those are given.
    """

    def __init__(self, capacities: Capacities, *, names: Iterable[str] | None = None) -> None:
        self._num_layers = capacities.model.num_layers
        self._pieces, fluid = _pieces(capacities, capacities.nodes if names is None else names)
        self._workers = Workers(capacities, names=fluid)
        self._columns: list[Picks] = []

    def excludes(
        self, flow: float, *, cells: int = STAGES[-1][0], may_go_on: Callable[[], bool] = lambda: True
    ) -> bool:
        """Whether it is proven that no placement carries ``flow`` tokens/s; more ``cells`` exclude more.

        Column generation: the program's prices ask the knapsack for the cheapest configuration, which becomes a column.
        Any prices are a proof if under them all nodes are worth less than all layers cost, so it ends as soon as some
        are; where the program itself fits all layers into its columns, no prices can be.
        """
        if not self._pieces:
            return False
        pieces, work = self._pieces, self._workers.work(flow)
        weights = [cells_up(group.tokens_per_s, flow, cells) * (group.tokens_per_s > 0) for group in pieces]
        prices = [np.minimum(group.tokens_per_s, flow) / flow for group in pieces]  # at first: by their work
        work_price = 1.0 / flow
        program = _Program(pieces, work, flow)
        for column in self._columns:
            if sum(int(weights[group][option]) for group, option in column) >= cells:
                program.add(column, 0.0)
        for step in range(MOST_COLUMNS):
            if not may_go_on():
                return False
            solved = cheapest([Group(g.count, w, p) for g, w, p in zip(pieces, weights, prices, strict=True)], cells)
            # A configuration that weighs less than the flow is filled up by nodes that count by their work.
            totals = solved.cost + work_price * flow * (cells - np.arange(cells + 1)) / cells
            weight = int(np.argmin(totals)) if work > 0 else cells
            cost = float(totals[weight])
            worth = work_price * work + sum(
                group.count * float((np.arange(1, len(price) + 1) * price).max())
                for group, price in zip(pieces, prices, strict=True)
            )
            if not np.isfinite(cost) or worth < cost * self._num_layers * (1 - SURELY):
                return True
            picks = tuple(sorted(solved.picks(weight)))
            if not program.has(picks):
                if weight == cells:
                    self._columns.append(picks)
                program.add(picks, flow * (cells - weight) / cells)
            elif step > 0:
                return False  # the program's own prices want nothing new: within its tolerances this is its optimum
            if program.solve() >= self._num_layers:
                return False
            prices, work_price = program.prices()
        return False

    def bound(self, *, low: float, high: float, may_go_on: Callable[[], bool] = lambda: True) -> float:
        """The least flow, up to the width of the bisection, that is excluded; ``high`` if none is.

        Args:
            low: a flow that is not asked about again, such as one that a known placement carries.
            high: a bound that holds already.
            may_go_on: asked before each step of the bisection.
        """
        for cells, width in STAGES:
            below = max(low, high * 1e-3)
            while high > below * (1 + width) and may_go_on():
                flow = (below + high) / 2
                if self.excludes(flow, cells=cells, may_go_on=may_go_on):
                    high = flow
                else:
                    below = flow
        return high


def _pieces(capacities: Capacities, names: Iterable[str]) -> tuple[list[_Pieces], list[str]]:
    """Nodes in groups of the same rates, wherever they are, and the nodes that count by their work."""
    groups: dict[tuple[float, ...], int] = {}
    fluid = []
    known: dict[int, tuple[float, ...]] = {}  # kind -> rates
    for name in names:
        if capacities.mixes_entries(name):
            fluid.append(name)
            continue
        kind = capacities.kind(name)
        if kind not in known:
            known[kind] = best_rates(capacities, name)
        if any(known[kind]):
            groups[known[kind]] = groups.get(known[kind], 0) + 1
    return [_Pieces(count, np.array(rates)) for rates, count in sorted(groups.items())], fluid


class _Program:
    """The linear program over known configurations: most layers that the nodes can hold, each in a configuration."""

    def __init__(self, pieces: list[_Pieces], work: float, flow: float) -> None:
        highspy = load_highspy()

        self._pieces, self._flow = pieces, flow
        self._row_of = np.cumsum([0, *(len(group.tokens_per_s) for group in pieces)])
        self._seen: set[Picks] = set()
        num_pieces = int(self._row_of[-1])
        self._work_row = num_pieces + len(pieces)
        self._highs: Any = highspy.Highs()
        self._highs.setOptionValue("output_flag", False)
        self._highs.setOptionValue("threads", 1)
        limits = [0.0] * num_pieces + [float(group.count) for group in pieces] + [work / flow]
        nothing = np.array([], dtype=np.int32), np.array([], dtype=np.float64)
        for limit in limits:
            self._highs.addRow(-highspy.kHighsInf, limit, 0, *nothing)
        for number, group in enumerate(pieces):
            for option in range(len(group.tokens_per_s)):
                # A node that holds k layers: k places in configurations.
                self._add(0.0, {int(self._row_of[number]) + option: -(option + 1.0), num_pieces + number: 1.0})
        self._highs.changeObjectiveSense(highspy.ObjSense.kMaximize)

    def has(self, picks: Picks) -> bool:
        """Whether the configuration is in already."""
        return picks in self._seen

    def add(self, picks: Picks, work: float) -> None:
        """Take in a configuration, with so many tokens/s of it done by nodes that count by their work."""
        self._seen.add(picks)
        use: dict[int, float] = {}
        for group, option in picks:
            row = int(self._row_of[group]) + option
            use[row] = use.get(row, 0.0) + 1.0
        if work > 0:
            use[self._work_row] = work / self._flow
        self._add(1.0, use)

    def _add(self, value: float, use: dict[int, float]) -> None:
        highspy = load_highspy()

        rows, amounts = np.array(list(use), dtype=np.int32), np.array(list(use.values()))
        self._highs.addCol(value, 0.0, highspy.kHighsInf, len(use), rows, amounts)

    def solve(self) -> float:
        """Layers that the known configurations can hold."""
        self._highs.run()
        return float(self._highs.getInfo().objective_function_value)

    def prices(self) -> tuple[list[FloatArray], float]:
        """Duals, never negative: of a place of each piece in a configuration, and of a token/s of work."""
        duals = np.maximum(np.array(self._highs.getSolution().row_dual), 0.0)
        by_group = [
            duals[int(self._row_of[number]) : int(self._row_of[number + 1])] for number in range(len(self._pieces))
        ]
        return by_group, float(duals[self._work_row]) / self._flow
