"""The optimum of a tiny cluster by looking at every placement, with nothing of the solver but its capacities."""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import linprog

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Placement


def largest_flow(capacities: Capacities, placement: Placement) -> float:
    """The max-flow of one placement, as a linear program written down from docs/design/bounds.md alone."""
    profile = capacities.profile
    num_layers = profile.model.num_layers
    hops: list[tuple[str, str, int]] = []
    for src in (COORDINATOR, *placement):
        layer = 0 if src == COORDINATOR else placement[src].end
        for dst, held in placement.items():
            enters = held.start <= layer < held.end if capacities.partial else held.start == layer
            if dst != src and enters and profile.link(src, dst) is not None:
                hops.append((src, dst, layer))
        if layer == num_layers and profile.link(src, COORDINATOR) is not None:
            hops.append((src, COORDINATOR, layer))
    if not hops:
        return 0.0
    rows, limits = [], []
    for name, held in placement.items():
        rows.append([1 / capacities.tokens_per_s(name, held, a) if dst == name else 0.0 for _, dst, a in hops])
        limits.append(1.0)
    cards = {node.name: (node.nic_out_bytes_per_s, node.nic_in_bytes_per_s) for node in profile.nodes}
    cards[COORDINATOR] = (profile.coordinator.nic_out_bytes_per_s, profile.coordinator.nic_in_bytes_per_s)
    for name in (COORDINATOR, *placement):
        for end, limit in ((0, cards[name][0]), (1, cards[name][1])):
            if limit is not None:
                rows.append([profile.bytes_per_token(*hop[:2]) / limit if hop[end] == name else 0.0 for hop in hops])
                limits.append(1.0)
    conserved = [[float(dst == name) - float(src == name) for src, dst, _ in hops] for name in placement]
    bounds = []
    for src, dst, _ in hops:
        link = profile.link(src, dst)
        assert link is not None
        bounds.append((0.0, link.bandwidth_bytes_per_s / profile.bytes_per_token(src, dst)))
    result = linprog(
        [-float(src == COORDINATOR) for src, _, _ in hops],
        A_ub=rows,
        b_ub=limits,
        A_eq=conserved,
        b_eq=[0.0] * len(placement),
        bounds=bounds,
    )
    assert result.status == 0, result.message
    return float(-result.fun)


def _goes_on(capacities: Capacities, placement: Placement) -> bool:
    """Whether something is carried after the loss of any one node."""
    return all(
        largest_flow(capacities, {name: held for name, held in placement.items() if name != lost}) > 1e-9
        for lost in placement
    )


def best_flow(capacities: Capacities) -> float:
    """The largest max-flow of any placement, of those that survive what they have to; 0 where none carries any.

    Placements are taken in the order of what the nodes at their scarcest layer can do in all, which no flow exceeds.
    """
    num_layers = capacities.model.num_layers
    options: list[list[LayerRange | None]] = []
    cover: list[np.ndarray] = []
    for name in capacities.nodes:
        mine: list[LayerRange | None] = [None]
        mine += [
            held
            for a, b in itertools.combinations(range(num_layers + 1), 2)
            if capacities.can_hold(name, held := LayerRange(a, b))
        ]
        options.append(mine)
        rows = np.zeros((len(mine), num_layers))
        for row, held in enumerate(mine):
            if held is not None:
                entries = range(held.start, held.end) if capacities.partial else (held.start,)
                rows[row, held.start : held.end] = max(capacities.tokens_per_s(name, held, a) for a in entries)
        cover.append(rows)
    total = cover[0]
    for rows in cover[1:]:
        total = (total[:, None, :] + rows[None, :, :]).reshape(-1, num_layers)
    most = total.min(axis=1)
    shape = [len(mine) for mine in options]
    best = 0.0
    for flat in np.argsort(-most, kind="stable"):
        if most[flat] <= best * (1 + 1e-12):
            break
        picks = np.unravel_index(flat, shape)
        placement = {
            name: held
            for name, mine, pick in zip(capacities.nodes, options, picks, strict=True)
            if (held := mine[int(pick)]) is not None
        }
        groups = [
            group for node in capacities.profile.nodes if node.name in placement and (group := node.exclusive_group)
        ]
        if len(groups) > len(set(groups)):
            continue
        flow = largest_flow(capacities, placement)
        if flow > best and (not capacities.survive or _goes_on(capacities, placement)):
            best = flow
    return best
