"""The widest chain of blocks in one region, by column generation and a small integer program at each flow tried.

A block of ``n`` layers has *tracks* side by side. A track is one node with ``n`` layers, or two, three, ... nodes of a
kind in a row that share them. Which tracks make the cheapest block that carries the flow is a knapsack; which blocks
together hold all layers is an integer program over the blocks worth having: those that the linear program's prices ask
for, as in cutting stock (Gilmore and Gomory, 1961). ``segments`` plans the same chains exactly, but over every number
of nodes of each kind; with many kinds that are too many, and it has to part the nodes. Here kinds cost one row each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helixbench.solver.bounds.knapsack import Group, cells_down, cheapest
from helixbench.solver.placement.segments import MOST_IN_A_ROW, Stock, in_a_row, largest_region, stock_of, well_linked
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Placement

RUNGS = (1 - 1e-4, 0.99, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Flows tried, as shares of the bound; it is often attained, just not in the last digit."""

STEPS = 5
"""Steps of bisection between the first rung that holds and the one above it."""

CELLS = 400
"""Cells of the knapsack: capacities are rounded down to this fraction of the flow, so that blocks really carry it."""

ROUNDS = 40
"""Rounds of column generation."""

DEARER = 1.3
"""Factor on the price of a kind, to find blocks that do without it."""


@dataclass(frozen=True)
class Track:
    """``num_nodes`` of a kind in a row, which hold a block's layers in parts as equal as possible."""

    kind: int
    num_nodes: int
    tokens_per_s: float


@dataclass(frozen=True)
class Block:
    """``num_layers`` layers held by tracks side by side."""

    num_layers: int
    tracks: tuple[Track, ...]

    def nodes_of(self, kind: int) -> int:
        """How many nodes of a kind it takes."""
        return sum(track.num_nodes for track in self.tracks if track.kind == kind)


def widest_chain(capacities: Capacities, *, bound: float, seconds: float) -> Placement | None:
    """The widest chain found in the largest region; ``None`` where there is none.

    Args:
        capacities: of the nodes.
        bound: no chain carries more.
        seconds: that the search may take.
    """
    region = largest_region(capacities)
    names = [name for name in well_linked(capacities, bound) if capacities.regions[name] == region]
    stock, num_layers = stock_of(capacities, names), capacities.model.num_layers
    if not stock.counts:
        return None
    end_s = time.perf_counter() + seconds
    best: list[Block] = []
    carried, above = 0.0, bound

    def try_flow(flow: float) -> bool:
        nonlocal best, carried
        left_s = end_s - time.perf_counter()
        chain = _chain(stock, num_layers, flow, 0.3 * left_s) if left_s > 0 else None
        if chain is not None:
            best = chain
            carried = min(sum(track.tokens_per_s for track in block.tracks) for block in chain)
        return chain is not None

    # Whether there is a chain is not monotone in its flow (blocks fit a flow well or badly), so no bisection from the
    # middle: the first rung that holds, then the space up to the rung that did not.
    for rung in RUNGS:
        if try_flow(bound * rung):
            break
        above = bound * rung
    for _ in range(STEPS):
        if not best or above <= carried * (1 + 1e-3):
            break
        flow = (carried + above) / 2
        if not try_flow(flow):
            above = flow
    return _lay_out(capacities, names, best) if best else None


def _chain(stock: Stock, num_layers: int, flow: float, seconds: float) -> list[Block] | None:
    """Blocks in the order of the chain, with fewest nodes; ``None`` where none are found in that time."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    deadline = time.perf_counter() + seconds / 2
    blocks = _worthwhile_blocks(stock, num_layers, flow, may_go_on=lambda: time.perf_counter() < deadline)
    if blocks is None:
        return None
    # How many of each block: no kind used up, all layers held. A last block that reaches beyond the model is cut.
    kinds = sorted(stock.counts)
    rows = [[float(block.nodes_of(kind)) for block in blocks] for kind in kinds]
    rows.append([float(block.num_layers) for block in blocks])
    low = [0.0] * len(kinds) + [float(num_layers)]
    high = [float(stock.counts[kind]) for kind in kinds] + [np.inf]
    result = milp(
        [float(sum(track.num_nodes for track in block.tracks)) for block in blocks],
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.ones(len(blocks), dtype=np.int64),
        bounds=Bounds(0, np.inf),
        # Any solution will do: fewest nodes only spares the solver a search among equals.
        options={"time_limit": max(0.05, seconds / 2), "mip_rel_gap": 1.0},
    )
    if result.x is None:
        return None
    chain = [block for block, count in zip(blocks, result.x, strict=True) for _ in range(round(count))]
    return sorted(chain, key=lambda block: (block.num_layers, block.tracks[0].kind, len(block.tracks)))


def _worthwhile_blocks(
    stock: Stock, num_layers: int, flow: float, *, may_go_on: Callable[[], bool]
) -> list[Block] | None:
    """Blocks that carry the flow, out of which all layers may be held; ``None`` where they surely cannot.

    Args:
        stock: the nodes by kind.
        num_layers: of the model.
        flow: tokens/s.
        may_go_on: asked before each round.
    """
    from scipy.optimize import linprog

    kinds = sorted(stock.counts)
    counts = np.array([float(stock.counts[kind]) for kind in kinds])
    blocks: dict[Block, None] = {}
    prices = {kind: _first_price(stock, kind, flow) for kind in kinds}
    layers = 0.0
    for number in range(ROUNDS):
        known = len(blocks)
        per_layer = np.inf
        for block, cost in _cheapest_blocks(stock, num_layers, flow, prices):
            per_layer = min(per_layer, cost / block.num_layers)
            if number == 0 or cost <= block.num_layers * (1 + 1e-9):  # a column of negative reduced cost
                blocks[block] = None
        # At these prices every layer costs at least ``per_layer``, and all nodes are worth less than all layers.
        if float(counts @ [prices[kind] for kind in kinds]) < per_layer * num_layers * (1 - 1e-9):
            return None
        if len(blocks) == known or not may_go_on():
            break
        use = [[float(block.nodes_of(kind)) for block in blocks] for kind in kinds]
        result: Any = linprog([-float(block.num_layers) for block in blocks], A_ub=use, b_ub=counts)
        layers = -float(result.fun)
        prices = dict(zip(kinds, np.maximum(-np.atleast_1d(result.ineqlin.marginals), 1e-6).tolist(), strict=True))
    if layers < num_layers * (1 - 1e-9):
        return None
    for dearer in kinds:
        # Blocks for when a kind has run out: whole numbers of blocks never use up every kind at once.
        if not may_go_on():
            break
        nearly = {kind: price * (DEARER if kind == dearer else 1.0) for kind, price in prices.items()}
        blocks |= {block: None for block, _ in _cheapest_blocks(stock, num_layers, flow, nearly)}
    return list(blocks)


def _first_price(stock: Stock, kind: int, flow: float) -> float:
    """The work of a node at that flow: a fair price before there is another."""
    rates = stock.rates[kind]
    return max(1e-6, float((np.arange(1, len(rates) + 1) * np.minimum(rates, flow)).max(initial=0.0)) / flow)


def _cheapest_blocks(stock: Stock, num_layers: int, flow: float, prices: dict[int, float]) -> list[tuple[Block, float]]:
    """The cheapest block of each length, and its cost."""
    kinds = [kind for kind in sorted(stock.counts) if len(stock.rates[kind])]
    longest = min(num_layers, max((len(stock.rates[kind]) for kind in kinds), default=0))
    found = []
    for length in range(1, longest + 1):
        tracks = [
            [_track(stock, kind, length, n) for n in range(1, min(MOST_IN_A_ROW, length, stock.counts[kind]) + 1)]
            for kind in kinds
        ]
        groups = [
            Group(
                stock.counts[kind],
                cells_down(np.array([track.tokens_per_s for track in options]), flow, CELLS),
                np.array([prices[kind] * track.num_nodes for track in options]),
            )
            for kind, options in zip(kinds, tracks, strict=True)
        ]
        solved = cheapest(groups, CELLS)
        if not np.isfinite(solved.cost[CELLS]):
            continue
        chosen = [tracks[group][option] for group, option in solved.picks(CELLS)]
        block = Block(length, tuple(sorted(chosen, key=lambda t: (-t.tokens_per_s, t.kind, t.num_nodes))))
        if all(block.nodes_of(kind) <= stock.counts[kind] for kind in kinds):
            found.append((block, float(solved.cost[CELLS])))
    return found


def _track(stock: Stock, kind: int, num_layers: int, num_nodes: int) -> Track:
    """``num_nodes`` nodes in a row for this many layers; 0 tokens/s where they cannot hold them."""
    longest, rates = -(-num_layers // num_nodes), stock.rates[kind]
    return Track(kind, num_nodes, float(rates[longest - 1]) if longest <= len(rates) else 0.0)


def _lay_out(capacities: Capacities, names: Sequence[str], chain: Sequence[Block]) -> Placement:
    """Blocks one after another. The last ranges end with the model, where blocks hold more layers than it has."""
    num_layers = capacities.model.num_layers
    left: dict[int, list[str]] = {}
    for name in names:
        left.setdefault(capacities.kind(name), []).append(name)
    placement: Placement = {}
    reached = 0
    for block in chain:
        for track in block.tracks:
            for held in in_a_row(reached, block.num_layers, track.num_nodes):
                if held.start < num_layers:
                    placement[left[track.kind].pop(0)] = LayerRange(held.start, min(held.end, num_layers))
        reached += block.num_layers
    return {name: held for name, held in placement.items() if capacities.can_hold(name, held)}
