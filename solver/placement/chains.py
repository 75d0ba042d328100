"""The widest chain of blocks in one region, found by trying flows from the bound downwards."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from helixbench.solver.placement.blocks import Block, Shop, open_shop, worthwhile_blocks
from helixbench.solver.placement.well_linked import well_linked
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Placement

RUNGS = (1 - 1e-4, 0.99, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Of the bound; it is often attained, just not in the last digit."""

STEPS = 5


def widest_chain(capacities: Capacities, *, bound: float, seconds: float) -> tuple[float, Placement] | None:
    """The widest chain found, and its flow; ``None`` where there is none.

    Args:
        capacities: of the nodes.
        bound: no chain carries more.
        seconds: that the search may take.
    """
    names = well_linked(capacities, bound)
    shop = open_shop(capacities, names)
    if not shop.counts:
        return None
    began = time.perf_counter()
    best: tuple[float, Placement] | None = None

    def try_flow(flow: float, part: float) -> bool:
        nonlocal best
        left = seconds - (time.perf_counter() - began)
        chosen = _chain(shop, flow, part * left) if left > 0 else None
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


def _chain(shop: Shop, flow: float, seconds: float) -> list[Block] | None:
    """Blocks in the order of the chain, with fewest nodes; ``None`` where none are found in that time."""
    deadline = time.perf_counter() + seconds / 2
    blocks = worthwhile_blocks(shop, flow, may_go_on=lambda: time.perf_counter() < deadline)
    counts = None if blocks is None else _choose(shop, blocks, seconds / 2)
    if counts is None:
        return None
    chain = [block for block, count in counts.items() for _ in range(count)]
    return sorted(chain, key=lambda block: (block.num_layers, block.tracks[0].kind, len(block.tracks)))


def _choose(shop: Shop, blocks: list[Block], seconds: float) -> dict[Block, int] | None:
    """How many of each block, so that all layers are held."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    kinds = sorted(shop.counts)
    rows = [[float(block.nodes_of(kind)) for block in blocks] for kind in kinds]
    rows.append([float(block.num_layers) for block in blocks])
    low = [0.0] * len(kinds) + [float(shop.num_layers)]
    high = [float(shop.counts[kind]) for kind in kinds] + [np.inf]
    result = milp(
        [float(sum(track.num_nodes for track in block.tracks)) for block in blocks],
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.ones(len(blocks), dtype=np.int64),
        bounds=Bounds(0, np.inf),
        options={"time_limit": max(0.05, seconds), "mip_rel_gap": 1.0},
    )
    if result.x is None:
        return None
    return {block: round(count) for block, count in zip(blocks, result.x, strict=True) if round(count)}


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
