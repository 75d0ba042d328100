"""One chain of stages through one or more regions, as wide as it can be: found by bisection on the flow it carries.

A stage is one or more alike nodes side by side that carry the flow together. Whether stages of the nodes at hand add up
to all layers is a small integer program. Where the chain passes from one region to the next, the stages on the two
sides must be wide enough that the links between their nodes carry the flow.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .capacity import Capacities
from .plan import LayerRange

Placement = dict[str, LayerRange]

MOST_SIDE_BY_SIDE = 8
STEPS = 14


@dataclass(frozen=True)
class _Stage:
    kind: int
    region: str
    width: int
    layers: int
    tokens_per_s: float


def widest_chain(
    capacities: Capacities,
    regions: Sequence[str],
    *,
    bound: float,
    link_tokens_per_s: Sequence[float],
    seconds: float,
) -> tuple[float, Placement] | None:
    """The widest chain through the regions in that order, and its flow; ``None`` where there is none.

    Args:
        capacities: of the nodes.
        regions: in the order of the layers; all nodes are in one of them.
        bound: no chain carries more.
        link_tokens_per_s: of one link at each crossing, one fewer than regions.
        seconds: that the search may take.
    """
    members: dict[int, list[str]] = {}
    for name in capacities.nodes:
        members.setdefault(capacities.kind(name), []).append(name)
    stages = _stages(capacities, members)
    low, high = 0.0, bound
    best: tuple[float, Placement] | None = None
    for _ in range(STEPS):
        flow = (low + high) / 2
        chosen = _fill(capacities, members, stages, regions, flow, link_tokens_per_s, seconds / STEPS)
        if chosen is None:
            high = flow
            continue
        low = min(stage.tokens_per_s for stage, _ in chosen)
        best = (low, _lay_out(capacities, members, chosen, regions))
    return best


def _stages(capacities: Capacities, members: dict[int, list[str]]) -> list[_Stage]:
    num_layers = capacities.model.num_layers
    found = []
    for kind, names in members.items():
        for layers in range(1, min(capacities.max_layers(names[0]), num_layers) + 1):
            start = 1 if layers < num_layers else 0
            held = LayerRange(start, start + layers)
            if not capacities.can_hold(names[0], held):
                continue
            rate = capacities.tokens_per_s(names[0], held)
            found += [
                _Stage(kind, capacities.nodes[names[0]].region, width, layers, width * rate)
                for width in range(1, min(len(names), MOST_SIDE_BY_SIDE) + 1)
            ]
    return found


def _fill(
    capacities: Capacities,
    members: dict[int, list[str]],
    stages: Sequence[_Stage],
    regions: Sequence[str],
    flow: float,
    link_tokens_per_s: Sequence[float],
    seconds: float,
) -> list[tuple[_Stage, int]] | None:
    """Stages that carry the flow and add up to all layers, with fewest nodes; ``None`` where there are none."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    usable = [stage for stage in stages if stage.tokens_per_s >= flow]
    if not usable:
        return None
    rows: list[list[float]] = []
    low: list[float] = []
    high: list[float] = []
    for kind in sorted(members):
        rows.append([float(stage.width) if stage.kind == kind else 0.0 for stage in usable])
        low.append(0.0)
        high.append(float(len(members[kind])))
    rows.append([float(stage.layers) for stage in usable])
    low.append(float(capacities.model.num_layers))
    high.append(float(capacities.model.num_layers))
    for region in regions:
        rows.append([float(stage.region == region) for stage in usable])
        low.append(1.0)
        high.append(np.inf)
    for (src, dst), rate in zip(itertools.pairwise(regions), link_tokens_per_s, strict=True):
        # Both sides at least as wide as the square root of the links needed: then their product is enough.
        need = int(np.ceil(np.sqrt(max(1.0, flow / max(rate, 1e-9)))))
        for region in (src, dst):
            rows.append([float(stage.region == region and stage.width >= need) for stage in usable])
            low.append(1.0 if region in (regions[0], regions[-1]) else 2.0)
            high.append(np.inf)
    result = milp(
        [float(stage.width) for stage in usable],
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.ones(len(usable), dtype=np.int64),
        bounds=Bounds(0, np.array([float(len(members[stage.kind]) // stage.width) for stage in usable])),
        options={"time_limit": max(0.05, seconds), "mip_rel_gap": 1.0},
    )
    if result.x is None:
        return None
    return [(stage, round(count)) for stage, count in zip(usable, result.x, strict=True) if round(count)]


def _lay_out(
    capacities: Capacities,
    members: dict[int, list[str]],
    chosen: Sequence[tuple[_Stage, int]],
    regions: Sequence[str],
) -> Placement:
    """Region by region; in each the widest stages first and last, where links to other regions are."""
    left = {kind: list(names) for kind, names in members.items()}
    placement: Placement = {}
    reached = 0
    for region in regions:
        mine = [stage for stage, count in chosen for _ in range(count) if stage.region == region]
        mine.sort(key=lambda stage: (-stage.width, stage.kind, -stage.layers))
        if len(mine) > 1:
            mine = [mine[0], *mine[2:], mine[1]]
        if region == regions[0]:
            mine.reverse()
        for stage in mine:
            for _ in range(stage.width):
                placement[left[stage.kind].pop(0)] = LayerRange(reached, reached + stage.layers)
            reached += stage.layers
    return {name: held for name, held in placement.items() if capacities.can_hold(name, held)}
