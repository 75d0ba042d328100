"""The widest chain of blocks through one or more regions, found by trying flows from the bound downwards.

Where the chain passes from one region to the next, each token takes a link of its own pair of nodes. So the last block
of the one region and the first of the next must have tracks enough, side by side, that the links between them carry
the flow.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np

from .blocks import Block, Shop, open_shop, worthwhile_blocks
from .capacity import Capacities
from .plan import LayerRange

Placement = dict[str, LayerRange]

RUNGS = (1 - 1e-4, 0.99, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Of the bound; it is often attained, just not in the last digit."""

STEPS = 5
MOST_SIDE_BY_SIDE = 6
"""Tracks that a crossing is planned with on either side."""


def widest_chain(
    capacities: Capacities,
    regions: Sequence[str],
    *,
    bound: float,
    link_tokens_per_s: Sequence[float],
    seconds: float,
) -> tuple[float, Placement] | None:
    """The widest chain found through the regions in that order, and its flow; ``None`` where there is none.

    Args:
        capacities: of the nodes.
        regions: in the order of the layers; only nodes in one of them are used.
        bound: no chain carries more.
        link_tokens_per_s: of one link at each crossing, one fewer than regions.
        seconds: that the search may take.
    """
    names = [name for name, node in capacities.nodes.items() if node.region in regions]
    shop = open_shop(capacities, names)
    if not shop.counts:
        return None
    began = time.perf_counter()
    best: tuple[float, Placement] | None = None

    def try_flow(flow: float, part: float) -> bool:
        nonlocal best
        left = seconds - (time.perf_counter() - began)
        chosen = _chain(shop, regions, flow, link_tokens_per_s, part * left) if left > 0 else None
        if chosen is not None:
            best = (min(block.carries() for block in chosen), _lay_out(capacities, names, chosen))
        return chosen is not None

    # Whether there is a chain is not monotone in its flow (blocks fit a flow well or badly), so no bisection from the
    # middle: the first rung that holds, then the space up to the rung that did not.
    above = bound
    for rung in RUNGS:
        if try_flow(bound * rung, 0.3):
            break
        above = bound * rung
    for _ in range(STEPS):
        if best is None or above <= best[0] * (1 + 1e-3):
            break
        flow = (best[0] + above) / 2
        if not try_flow(flow, 0.3):
            above = flow
    return best


def _chain(
    shop: Shop, regions: Sequence[str], flow: float, rates: Sequence[float], seconds: float
) -> list[Block] | None:
    """Blocks in the order of the chain, with fewest nodes; ``None`` where none are found."""
    counts = choose_blocks(shop, regions, flow, rates, seconds)
    return None if counts is None else _in_order(regions, flow, rates, counts)


def choose_blocks(
    shop: Shop, regions: Sequence[str], flow: float, rates: Sequence[float], seconds: float
) -> dict[Block, int] | None:
    """How many of each block make a chain that carries the flow, with fewest nodes; ``None`` where none is found.

    Args:
        shop: what there is.
        regions: to pass through, in that order.
        flow: tokens/s.
        rates: tokens/s of one link at each crossing, one fewer than regions.
        seconds: that it may take.
    """
    deadline = time.perf_counter() + seconds / 2
    limits = sorted({n * rate for rate in rates for n in range(1, MOST_SIDE_BY_SIDE + 1)}, reverse=True)
    limits = [limit for limit in limits if limit < flow]
    blocks = worthwhile_blocks(shop, flow, limits, may_go_on=lambda: time.perf_counter() < deadline)
    return None if blocks is None else _choose(shop, regions, flow, rates, blocks, seconds / 2)


def _fits(block: Block, width: int, links: float, flow: float) -> bool:
    """Whether it can stand at a crossing with so many tracks, each with links that carry so much to the other side."""
    return len(block.tracks) >= width and block.carries(links) >= flow * (1 - 1e-9)


def _choose(
    shop: Shop, regions: Sequence[str], flow: float, rates: Sequence[float], blocks: list[Block], seconds: float
) -> dict[Block, int] | None:
    """How many of each block: all layers held, every region passed, every crossing wide enough on both sides."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    pairs = [(p, q) for p in range(1, MOST_SIDE_BY_SIDE + 1) for q in range(1, MOST_SIDE_BY_SIDE + 1)]
    options = [(crossing, p, q) for crossing, rate in enumerate(rates) for p, q in pairs if p * q * rate >= flow]
    num_blocks, size = len(blocks), len(blocks) + len(options)
    rows: list[np.ndarray] = []
    low: list[float] = []
    high: list[float] = []

    def require(on_blocks: list[float], on_options: list[float], least: float, most: float) -> None:
        rows.append(np.array(on_blocks + on_options))
        low.append(least)
        high.append(most)

    none = [0.0] * len(options)
    for kind, count in sorted(shop.counts.items()):
        require([float(block.nodes_of(kind)) for block in blocks], none, 0.0, float(count))
    require([float(block.num_layers) for block in blocks], none, float(shop.num_layers), np.inf)
    for region in regions:
        require([float(block.region == region) for block in blocks], none, 1.0, np.inf)
    for crossing, (src, dst) in enumerate(itertools.pairwise(regions)):
        require([0.0] * num_blocks, [float(option[0] == crossing) for option in options], 1.0, 1.0)
        for number, (at, p, q) in enumerate(options):
            if at != crossing:
                continue
            for region, width, others in ((src, p, q), (dst, q, p)):
                fitting = [
                    float(block.region == region and _fits(block, width, others * rates[at], flow)) for block in blocks
                ]
                require(fitting, [-float(other == number) for other in range(len(options))], 0.0, np.inf)
    nodes = [float(sum(track.num_nodes for track in block.tracks)) for block in blocks]
    result = milp(
        nodes + none,
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.ones(size, dtype=np.int64),
        bounds=Bounds(0, np.array([np.inf] * num_blocks + [1.0] * len(options))),
        options={"time_limit": max(0.05, seconds), "mip_rel_gap": 1.0},
    )
    if result.x is None:
        return None
    return {block: round(count) for block, count in zip(blocks, result.x, strict=False) if round(count)}


def _in_order(
    regions: Sequence[str], flow: float, rates: Sequence[float], counts: dict[Block, int]
) -> list[Block] | None:
    """Region by region; in each the blocks at the crossings first and last. Layers too many are left off the widest."""
    placed: list[Block] = []
    entering: Block | None = None
    for number, region in enumerate(regions):
        mine = [block for block, count in counts.items() for _ in range(count) if block.region == region]
        mine.sort(key=lambda block: (block.num_layers, block.tracks[0].kind, len(block.tracks)))
        if entering is not None:
            mine.remove(entering)
            mine.insert(0, entering)
        if number < len(rates):
            others = [block for block in counts if block.region == regions[number + 1]]
            crossing = _crossing(mine, others, rates[number], flow, len(mine) > 1 and entering is not None)
            if crossing is None:
                return None
            leaving, entering = crossing
            mine.remove(leaving)
            mine.append(leaving)
        placed += mine
    return placed


def _crossing(
    mine: Sequence[Block], others: Sequence[Block], rate: float, flow: float, is_first_taken: bool
) -> tuple[Block, Block] | None:
    """A block on each side between which links carry the flow, with fewest tracks; not the first if taken."""
    fitting = [
        (a, b)
        for number, a in enumerate(mine)
        for b in others
        if _fits(a, 1, len(b.tracks) * rate, flow)
        and _fits(b, 1, len(a.tracks) * rate, flow)
        and not (is_first_taken and number == 0)
    ]
    if not fitting:
        return None
    return min(fitting, key=lambda pair: len(pair[0].tracks) + len(pair[1].tracks))


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
            share, longer = divmod(block.num_layers, track.num_nodes)
            start = reached
            for number in range(track.num_nodes):
                end = start + share + (number < longer)
                if start < num_layers:
                    placement[left[track.kind].pop(0)] = LayerRange(start, min(end, num_layers))
                start = end
        reached += block.num_layers
    return {name: held for name, held in placement.items() if capacities.can_hold(name, held)}
