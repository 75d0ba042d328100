"""Blocks: nodes that hold the same few layers together and carry a flow; chains are made of them.

A block of ``n`` layers has *tracks* side by side. A track is one node with ``n`` layers, or two, three, ... nodes of a
kind in a row that share them. Which tracks make the cheapest block that carries the flow is a knapsack; which blocks
hold all layers is a small integer program over the blocks worth having, found by the linear program's prices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helixbench.solver.bounds.knapsack import FloatArray, Group, cells_down, cheapest
from helixbench.solver.bounds.work import card_limits
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange

CELLS = 400
MOST_IN_A_ROW = 4
ROUNDS = 40
DEARER = 1.3


@dataclass(frozen=True)
class Track:
    """``num_nodes`` of a kind in a row, which hold a block's layers in parts as equal as can be."""

    kind: int
    num_nodes: int
    tokens_per_s: float


@dataclass(frozen=True)
class Block:
    """``num_layers`` layers held by tracks side by side."""

    num_layers: int
    tracks: tuple[Track, ...]

    def carries(self) -> float:
        """Tokens/s."""
        return sum(track.tokens_per_s for track in self.tracks)

    def nodes_of(self, kind: int) -> int:
        """How many nodes of a kind it takes."""
        return sum(track.num_nodes for track in self.tracks if track.kind == kind)


@dataclass(frozen=True)
class Shop:
    """The kinds of nodes that blocks are made of.

    Attributes:
        counts: kind -> number of nodes.
        rates: kind -> tokens/s with 1, 2, ... layers held; 0 where that cannot be.
        num_layers: of the model.
    """

    counts: dict[int, int]
    rates: dict[int, FloatArray]
    num_layers: int

    def track(self, kind: int, num_layers: int, num_nodes: int) -> Track:
        """``num_nodes`` nodes in a row for so many layers; 0 tokens/s where they cannot hold them."""
        longest = -(-num_layers // num_nodes)
        rates = self.rates[kind]
        return Track(kind, num_nodes, float(rates[longest - 1]) if longest <= len(rates) else 0.0)


def open_shop(capacities: Capacities, names: Sequence[str]) -> Shop:
    """The shop of the nodes named; pinned nodes are not in it.

    Rates are those in the middle of the model, where tokens come in and go out through the node's network card.
    """
    num_layers = capacities.model.num_layers
    counts: dict[int, int] = {}
    rates: dict[int, FloatArray] = {}
    for name in names:
        kind = capacities.kind(name)
        if name in capacities.pins:
            continue
        counts[kind] = counts.get(kind, 0) + 1
        if kind not in rates:
            held = [_somewhere(length, num_layers) for length in range(1, capacities.max_layers(name) + 1)]
            most = min(card_limits(capacities, name))
            rates[kind] = np.array(
                [min(capacities.tokens_per_s(name, h), most) if capacities.can_hold(name, h) else 0.0 for h in held]
            )
    return Shop(counts, rates, num_layers)


def _somewhere(length: int, num_layers: int) -> LayerRange:
    start = 1 if length < num_layers else 0
    return LayerRange(start, start + length)


def worthwhile_blocks(shop: Shop, flow: float, *, may_go_on: Callable[[], bool]) -> list[Block] | None:
    """Blocks that carry the flow, out of which all layers may be held; ``None`` where they surely cannot.

    Args:
        shop: what there is.
        flow: tokens/s.
        may_go_on: asked before each round.
    """
    from scipy.optimize import linprog

    kinds = sorted(shop.counts)
    counts = np.array([float(shop.counts[kind]) for kind in kinds])
    blocks: dict[Block, None] = {}
    prices = {kind: _first_price(shop, kind, flow) for kind in kinds}
    layers = 0.0
    for number in range(ROUNDS):
        known = len(blocks)
        per_layer = np.inf
        for block, cost in _cheapest_blocks(shop, flow, prices):
            per_layer = min(per_layer, cost / block.num_layers)
            if number == 0 or cost <= block.num_layers * (1 + 1e-9):
                blocks[block] = None
        if float(counts @ [prices[kind] for kind in kinds]) < per_layer * shop.num_layers * (1 - 1e-9):
            return None
        if len(blocks) == known or not may_go_on():
            break
        use = [[float(block.nodes_of(kind)) for block in blocks] for kind in kinds]
        result: Any = linprog([-float(block.num_layers) for block in blocks], A_ub=use, b_ub=counts)
        layers = -float(result.fun)
        prices = dict(zip(kinds, np.maximum(-np.atleast_1d(result.ineqlin.marginals), 1e-6).tolist(), strict=True))
    if layers < shop.num_layers * (1 - 1e-9):
        return None
    for dearer in kinds:
        # Blocks for when a kind has run out: whole numbers of blocks never use up every kind at once.
        if not may_go_on():
            break
        nearly = {kind: price * (DEARER if kind == dearer else 1.0) for kind, price in prices.items()}
        blocks |= {block: None for block, _ in _cheapest_blocks(shop, flow, nearly)}
    return list(blocks)


def _first_price(shop: Shop, kind: int, flow: float) -> float:
    """The work of a node at that flow: a fair price before there is another."""
    rates = shop.rates[kind]
    return max(1e-6, float((np.arange(1, len(rates) + 1) * np.minimum(rates, flow)).max(initial=0.0)) / flow)


def _cheapest_blocks(shop: Shop, flow: float, prices: dict[int, float]) -> list[tuple[Block, float]]:
    """Of each length the cheapest block and what it costs."""
    kinds = [kind for kind in sorted(shop.counts) if len(shop.rates[kind])]
    longest = min(shop.num_layers, max((len(shop.rates[kind]) for kind in kinds), default=0))
    found = []
    for num_layers in range(1, longest + 1):
        tracks = [
            [shop.track(kind, num_layers, n) for n in range(1, min(MOST_IN_A_ROW, num_layers, shop.counts[kind]) + 1)]
            for kind in kinds
        ]
        groups = [
            Group(
                shop.counts[kind],
                cells_down(np.array([track.tokens_per_s for track in options]), flow, CELLS),
                np.array([prices[kind] * track.num_nodes for track in options]),
            )
            for kind, options in zip(kinds, tracks, strict=True)
        ]
        solved = cheapest(groups, CELLS)
        if not np.isfinite(solved.cost[CELLS]):
            continue
        block = Block(num_layers, tuple(sorted((tracks[g][o] for g, o in solved.picks(CELLS)), key=_order)))
        if all(block.nodes_of(kind) <= shop.counts[kind] for kind in kinds):
            found.append((block, float(solved.cost[CELLS])))
    return found


def _order(track: Track) -> tuple[float, int, int]:
    return -track.tokens_per_s, track.kind, track.num_nodes
