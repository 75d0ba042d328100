"""Chains of stages, each held by one or more alike nodes side by side: the shape in which KV caches fill evenly.

For ``N`` requests in flight every stage must admit ``N`` requests. Which stages then make the shortest round is a small
integer program: so many of each kind of stage, layers adding up to the model's. Little's law turns a round into
tokens/s, so the shortest round at some ``N`` is the most throughput at it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from helixbench.solver.expected.analytic import prompt_s, round_s
from helixbench.solver.problem.capacity import Capacities, admitted_requests
from helixbench.solver.problem.plan import LayerRange, Placement

FEW_SIDE_BY_SIDE = 2
MOST_SIDE_BY_SIDE = 6
MOST_LEVELS = 24
"""Number of levels of requests in flight to plan for, from the most that any chain of stages admits down."""

MOST_KINDS = 16

PROMPT_SHARES = (0.0, 0.5, 1.0)
"""Shares of a prompt's time at a stage that delay a token in a round: all of it where prompts are many, next to nothing
where they are few."""


@dataclass(frozen=True)
class _Stage:
    """``width`` nodes of one kind that each hold ``layers`` layers, seen from the middle of the model."""

    kind: int
    width: int
    layers: int
    requests: float
    most_tokens_per_s: float


def stacks(capacities: Capacities, *, hop_s: float, most_side_by_side: int) -> Iterator[Placement]:
    """Placements with the shortest round, for levels of requests in flight from many to few.

    Args:
        capacities: of the nodes.
        hop_s: seconds of a hop over a link.
        most_side_by_side: nodes of a stage.
    """
    members: dict[int, list[str]] = {}
    for name in capacities.nodes:
        members.setdefault(capacities.kind(name), []).append(name)
    if len(members) > MOST_KINDS:
        return
    stages = _stages(capacities, members, most_side_by_side)

    def chain_for(in_flight: float, share: float) -> tuple[tuple[_Stage, int], ...]:
        usable = [stage for stage in stages if stage.requests >= in_flight * (1 - 1e-9)]
        seconds = [_seconds(capacities, members, stage, in_flight, hop_s, share) for stage in usable]
        return tuple(_shortest(members, usable, seconds, capacities.model.num_layers))

    levels = _levels(capacities, stages)
    most = bisect_left(range(len(levels)), True, key=lambda i: not chain_for(levels[i], 1.0))  # the first out of reach
    seen: set[tuple[tuple[_Stage, int], ...]] = set()
    for in_flight in reversed(levels[max(0, most - MOST_LEVELS) : most]):
        for share in PROMPT_SHARES:
            chosen = chain_for(in_flight, share)
            if chosen and chosen not in seen:
                seen.add(chosen)
                yield _lay_out(capacities, members, chosen)


def _stages(capacities: Capacities, members: dict[int, list[str]], most_side_by_side: int) -> list[_Stage]:
    num_layers = capacities.model.num_layers
    found = []
    for kind, names in members.items():
        for layers in range(1, min(capacities.max_layers(names[0]), num_layers) + 1):
            held = capacities.middle(layers)
            if not capacities.can_hold(names[0], held):
                continue
            requests = admitted_requests(capacities, names[0], held)
            rate = capacities.tokens_per_s(names[0], held)
            found += [
                _Stage(kind, width, layers, width * requests, width * rate)
                for width in range(1, min(len(names), most_side_by_side) + 1)
            ]
    return found


def _levels(capacities: Capacities, stages: Sequence[_Stage]) -> list[float]:
    """Requests in flight to plan for: what stages admit, up to what is asked for."""
    asked = capacities.concurrency
    levels = sorted({round(stage.requests, 3) for stage in stages if stage.requests >= 1})
    if asked is not None:
        levels = [level for level in levels if level < asked] + [float(asked)]
    return levels


def _seconds(
    capacities: Capacities,
    members: dict[int, list[str]],
    stage: _Stage,
    in_flight: float,
    hop_s: float,
    prompt_share: float,
) -> float:
    held, name = capacities.middle(stage.layers), members[stage.kind][0]
    decode_s = round_s(capacities, name, held, max(1.0, in_flight / stage.width))
    return hop_s + decode_s + prompt_share * prompt_s(capacities, name, held)


def _shortest(
    members: dict[int, list[str]], stages: Sequence[_Stage], seconds: Sequence[float], num_layers: int
) -> list[tuple[_Stage, int]]:
    """How many of each stage, for the shortest round; empty if no stages add up to the model's layers.

    An integer program with a column for each stage, a row for the nodes of each kind and one for the layers.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    if not stages:
        return []
    kinds = sorted(members)
    rows = [[float(stage.width) if stage.kind == kind else 0.0 for stage in stages] for kind in kinds]
    rows.append([float(stage.layers) for stage in stages])
    low = [0.0] * len(kinds) + [float(num_layers)]
    high = [float(len(members[kind])) for kind in kinds] + [float(num_layers)]
    result = milp(
        list(seconds),
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.ones(len(stages), dtype=np.int64),
        bounds=Bounds(0, np.array([float(len(members[stage.kind]) // stage.width) for stage in stages])),
        options={"time_limit": 2.0, "mip_rel_gap": 1e-4},
    )
    if result.x is None:
        return []
    return [(stage, round(count)) for stage, count in zip(stages, result.x, strict=True) if round(count)]


def _lay_out(capacities: Capacities, members: dict[int, list[str]], chosen: Sequence[tuple[_Stage, int]]) -> Placement:
    """The stages one after another, those of one region together.

    Where there are nodes side by side, single ones stand between them: what one of a pair gets more of than the other
    then evens out before the next pair, however requests are routed.
    """
    left = {kind: list(names) for kind, names in members.items()}
    by_region: dict[str, list[_Stage]] = {}
    for stage, count in sorted(chosen, key=lambda item: (item[0].kind, item[0].layers, item[0].width)):
        region = capacities.regions[members[stage.kind][0]]
        by_region.setdefault(region, []).extend([stage] * count)
    placement: Placement = {}
    reached = 0
    for stages in by_region.values():
        for stage in _apart(stages):
            for _ in range(stage.width):
                placement[left[stage.kind].pop(0)] = LayerRange(reached, reached + stage.layers)
            reached += stage.layers
    return placement


def _apart(stages: Sequence[_Stage]) -> list[_Stage]:
    """Wide stages alternate with single ones, those that carry most first, as long as there are both."""
    wide = [stage for stage in stages if stage.width > 1]
    single = sorted((stage for stage in stages if stage.width == 1), key=lambda stage: -stage.most_tokens_per_s)
    turns = min(len(wide), len(single))
    alternating = [stage for pair in zip(wide[:turns], single[:turns], strict=True) for stage in pair]
    return [*alternating, *wide[turns:], *single[turns:]]
