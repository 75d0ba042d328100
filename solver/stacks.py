"""Chains of stages, each held by one or more alike nodes side by side: the shape in which KV caches fill evenly.

For ``N`` requests in flight and a target of ``X`` tokens/s every stage must admit ``N`` requests and carry ``X``. Which
stages then make the shortest time round is a small integer program: so many of each kind of stage, layers adding up to
the model's. Little's law turns the time round into tokens/s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .capacity import Capacities
from .expected import admitted_requests, round_s
from .plan import LayerRange

Placement = dict[str, LayerRange]

MOST_SIDE_BY_SIDE = 6
MOST_LEVELS = 24
MOST_KINDS = 16


@dataclass(frozen=True)
class _Stage:
    """``width`` nodes of one kind that each hold ``layers`` layers, seen from the middle of the model."""

    kind: int
    width: int
    layers: int
    requests: float
    tokens_per_s: float


def stacks(capacities: Capacities, *, hop_s: float) -> Iterator[Placement]:
    """Placements, for levels of requests in flight from few to many; the best for each level, then all better ones.

    Args:
        capacities: of the nodes.
        hop_s: seconds of a hop over a link.
    """
    members: dict[int, list[str]] = {}
    for name in capacities.nodes:
        members.setdefault(capacities.kind(name), []).append(name)
    if len(members) > MOST_KINDS:
        return
    stages = _stages(capacities, members)
    reached = 0.0
    for in_flight in _levels(capacities, stages):
        while True:
            chosen = _shortest(capacities, members, stages, in_flight, reached, hop_s)
            if not chosen:
                break
            seconds = sum(count * _seconds(capacities, members, stage, in_flight, hop_s) for stage, count in chosen)
            carried = min(stage.tokens_per_s for stage, _ in chosen)
            tokens_per_s = min(carried, in_flight * capacities.mix.tokens_per_output / seconds)
            if tokens_per_s <= reached * 1.001:
                break
            reached = tokens_per_s
            yield _lay_out(members, chosen)


def _stages(capacities: Capacities, members: dict[int, list[str]]) -> list[_Stage]:
    num_layers = capacities.model.num_layers
    found = []
    for kind, names in members.items():
        for layers in range(1, min(capacities.max_layers(names[0]), num_layers) + 1):
            held = LayerRange(0, layers) if layers == num_layers else LayerRange(1, layers + 1)
            if held.end > num_layers or not capacities.can_hold(names[0], held):
                continue
            requests = admitted_requests(capacities, names[0], held)
            rate = capacities.tokens_per_s(names[0], held)
            found += [
                _Stage(kind, width, layers, width * requests, width * rate)
                for width in range(1, min(len(names), MOST_SIDE_BY_SIDE) + 1)
            ]
    return found


def _levels(capacities: Capacities, stages: Sequence[_Stage]) -> list[float]:
    """Requests in flight to plan for: what stages admit, up to what is asked for."""
    asked = capacities.concurrency
    levels = sorted({round(stage.requests, 3) for stage in stages if stage.requests >= 1})
    if asked is not None:
        levels = [level for level in levels if level < asked] + [float(asked)]
    if len(levels) > MOST_LEVELS:
        levels = [levels[round(i)] for i in np.linspace(0, len(levels) - 1, MOST_LEVELS)]
    return levels


def _seconds(
    capacities: Capacities, members: dict[int, list[str]], stage: _Stage, in_flight: float, hop_s: float
) -> float:
    num_layers = capacities.model.num_layers
    start = 1 if stage.layers < num_layers else 0
    held = LayerRange(start, start + stage.layers)
    return hop_s + round_s(capacities, members[stage.kind][0], held, max(1.0, in_flight / stage.width))


def _shortest(
    capacities: Capacities,
    members: dict[int, list[str]],
    stages: Sequence[_Stage],
    in_flight: float,
    above: float,
    hop_s: float,
) -> list[tuple[_Stage, int]]:
    """How many of each stage, for the shortest time round of all that carry more than ``above``; empty if none do."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    usable = [s for s in stages if s.requests >= in_flight * (1 - 1e-9) and s.tokens_per_s > above * 1.001]
    if not usable:
        return []
    kinds = sorted(members)
    rows = [[float(stage.width) if stage.kind == kind else 0.0 for stage in usable] for kind in kinds]
    rows.append([float(stage.layers) for stage in usable])
    num_layers = float(capacities.model.num_layers)
    low = [0.0] * len(kinds) + [num_layers]
    high = [float(len(members[kind])) for kind in kinds] + [num_layers]
    result = milp(
        [_seconds(capacities, members, stage, in_flight, hop_s) for stage in usable],
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.ones(len(usable), dtype=np.int64),
        bounds=Bounds(0, np.array([float(len(members[stage.kind]) // stage.width) for stage in usable])),
        options={"time_limit": 2.0, "mip_rel_gap": 1e-3},
    )
    if result.x is None:
        return []
    return [(stage, round(count)) for stage, count in zip(usable, result.x, strict=True) if round(count)]


def _lay_out(members: dict[int, list[str]], chosen: Sequence[tuple[_Stage, int]]) -> Placement:
    """The stages one after another, those of one kind together."""
    left = {kind: list(names) for kind, names in members.items()}
    placement: Placement = {}
    reached = 0
    for stage, count in sorted(chosen, key=lambda item: (item[0].kind, item[0].layers, item[0].width)):
        for _ in range(count):
            for _ in range(stage.width):
                placement[left[stage.kind].pop(0)] = LayerRange(reached, reached + stage.layers)
            reached += stage.layers
    return placement
