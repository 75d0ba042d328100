"""Baselines: placement heuristics to compare a plan with, exactly as published.

Each gives a placement or ``None`` where its rule finds none. Source: Helix, ASPLOS 2025, section 6, after Petals
(Borzunov et al., 2023) and SWARM (Ryabinin et al., 2023).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Placement


def petals(capacities: Capacities) -> Placement | None:
    """Every node holds its maximum, where the throughput of the layers is least.

    Nodes come in the order of ``random.seed(0)`` and ``shuffle`` of the file's order; each takes the window whose
    throughputs, sorted, are lexicographically smallest (the first of equals), and adds its own to them.
    """
    num_layers = capacities.model.num_layers
    order = list(capacities.nodes)
    random.Random(0).shuffle(order)
    per_layer = [0.0] * num_layers
    placement: Placement = {}
    for name in order:
        windows = [LayerRange(s, e) for s in range(num_layers) if (e := _longest_end(capacities, name, s)) is not None]
        longest = max((window.num_layers for window in windows), default=0)
        windows = [window for window in windows if window.num_layers == longest]
        if not windows:
            continue
        chosen = min(windows, key=lambda window: sorted(per_layer[window.start : window.end]))
        throughput = capacities.tokens_per_s(name, chosen)
        for layer in range(chosen.start, chosen.end):
            per_layer[layer] += throughput
        placement[name] = chosen
    return placement if min(per_layer) > 0 else None


def swarm(capacities: Capacities) -> Placement | None:
    """Equal stages that fit the smallest node; nodes by throughput, each to the stage that has least.

    Nodes that can hold no layer are left out: the smallest is one that can.
    Equal throughputs: the later node in the file first; equal stages: the first. Where the layers do not divide, the
    first stages hold one layer more.
    """
    num_layers = capacities.model.num_layers
    sizes = {name: size for name in capacities.nodes if (size := capacities.max_layers(name))}
    if not sizes:
        return None
    smallest = min(sizes.values())
    num_stages = -(-num_layers // smallest)
    cuts = [stage * (num_layers // num_stages) + min(stage, num_layers % num_stages) for stage in range(num_stages + 1)]
    stages = [LayerRange(a, b) for a, b in itertools.pairwise(cuts)]
    middle = stages[len(stages) // 2]
    index = {name: number for number, name in enumerate(sizes)}
    order = sorted(index, key=lambda name: (-capacities.tokens_per_s(name, middle), -index[name]))
    gathered = [0.0] * len(stages)
    placement: Placement = {}
    for name in order:
        fitting = [number for number, held in enumerate(stages) if capacities.can_hold(name, held)]
        if not fitting:
            continue
        stage = min(fitting, key=lambda number: gathered[number])
        gathered[stage] += capacities.tokens_per_s(name, stages[stage])
        placement[name] = stages[stage]
    return placement if min(gathered) > 0 else None


def homogeneous(capacities: Capacities) -> Placement | None:
    """Pipelines filled greedily with maximal ranges, types by what they do in all; the last range is cut at the end.

    A pipeline left unfinished goes on with the next type; nodes left over at the end are not used.
    """
    placement, unfinished = _fill(capacities, _types_by_work(capacities))
    for name in unfinished:
        del placement[name]
    return placement or None


def separate(capacities: Capacities) -> Placement | None:
    """One set of pipelines for each type of node, filled as ``homogeneous`` does; an unfinished one is dropped."""
    placement: Placement = {}
    for members in _types_by_work(capacities):
        filled, unfinished = _fill(capacities, [members])
        placement |= {name: held for name, held in filled.items() if name not in unfinished}
    return placement or None


METHODS: dict[str, Callable[[Capacities], Placement | None]] = {
    "petals": petals,
    "swarm": swarm,
    "homogeneous": homogeneous,
    "separate": separate,
}


def _fill(capacities: Capacities, types: list[list[str]]) -> tuple[Placement, list[str]]:
    """Pipelines of the nodes in order, and the nodes of the last one where it does not reach the end."""
    placement: Placement = {}
    reached, unfinished = 0, list[str]()
    for name in (name for members in types for name in members):
        end = _longest_end(capacities, name, reached)
        if end is None:
            continue
        placement[name] = LayerRange(reached, end)
        unfinished.append(name)
        reached = end
        if reached == capacities.model.num_layers:
            reached, unfinished = 0, []
    return placement, unfinished


def _types_by_work(capacities: Capacities) -> list[list[str]]:
    """Nodes by type of device, types by layers x tokens/s at their maximum, largest first."""
    types: dict[tuple[str, str, int], list[str]] = {}
    for name, node in capacities.nodes.items():
        types.setdefault((node.device.kind, node.device.name, node.max_layers), []).append(name)

    def work(members: list[str]) -> float:
        longest = capacities.max_layers(members[0])
        return longest * capacities.tokens_per_s(members[0], capacities.middle(longest)) if longest else 0.0

    return sorted(types.values(), key=lambda members: -work(members))


def _longest_end(capacities: Capacities, name: str, start: int) -> int | None:
    """End of the longest range that the node can hold from ``start``; ``None`` where it can hold none."""
    most = min(capacities.nodes[name].max_layers, capacities.model.num_layers - start)
    for length in range(most, 0, -1):
        if capacities.can_hold(name, LayerRange(start, start + length)):
            return start + length
    return None
