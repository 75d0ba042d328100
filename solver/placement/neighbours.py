"""Placements that differ little from a given one: the moves of the neighbourhood search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Placement


def neighbours(capacities: Capacities, placement: Mapping[str, LayerRange]) -> Iterator[Placement]:
    """Neighbours in a fixed order, those that change least first; each holds only what its nodes can."""
    for candidate in _all(capacities, placement):
        if all(capacities.can_hold(name, held) for name, held in candidate.items()):
            yield candidate


def _all(capacities: Capacities, placement: Mapping[str, LayerRange]) -> Iterator[Placement]:
    yield from _moved_boundaries(capacities, placement)
    yield from _swaps(capacities, placement)
    yield from _without_one(placement)
    yield from _one_elsewhere(capacities, placement)


def _moved_boundaries(capacities: Capacities, placement: Mapping[str, LayerRange]) -> Iterator[Placement]:
    """Every range that starts or ends at one boundary moves with it."""
    num_layers = capacities.model.num_layers
    cuts = sorted({held.start for held in placement.values()} - {0})
    for cut in cuts:
        for shift in (-1, 1, -2, 2, -3, 3):
            if not 0 < cut + shift < num_layers:
                continue
            moved: Placement = {}
            for name, held in placement.items():
                start = cut + shift if held.start == cut else held.start
                end = cut + shift if held.end == cut else held.end
                if start >= end:
                    break
                moved[name] = LayerRange(start, end)
            else:
                yield moved


def _swaps(capacities: Capacities, placement: Mapping[str, LayerRange]) -> Iterator[Placement]:
    names = sorted(capacities.nodes)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            mine, theirs = placement.get(one), placement.get(other)
            if mine == theirs or capacities.kind(one) == capacities.kind(other):
                continue
            swapped = {name: held for name, held in placement.items() if name not in (one, other)}
            if theirs is not None:
                swapped[one] = theirs
            if mine is not None:
                swapped[other] = mine
            yield swapped


def _without_one(placement: Mapping[str, LayerRange]) -> Iterator[Placement]:
    for name in sorted(placement):
        if len(placement) > 1:
            yield {other: held for other, held in placement.items() if other != name}


def _one_elsewhere(capacities: Capacities, placement: Mapping[str, LayerRange]) -> Iterator[Placement]:
    """One node takes another range: between boundaries that there are, or the same length at another place."""
    num_layers = capacities.model.num_layers
    cuts = sorted({0, num_layers, *(held.start for held in placement.values()), *(h.end for h in placement.values())})
    joined = [LayerRange(a, b) for i, a in enumerate(cuts) for b in cuts[i + 1 :]]
    for name in sorted(capacities.nodes):
        held = placement.get(name)
        for candidate in joined:
            if candidate != held and candidate.num_layers <= capacities.nodes[name].max_layers:
                yield {**placement, name: candidate}
        if held is not None:
            for start in range(num_layers - held.num_layers + 1):
                if start != held.start:
                    yield {**placement, name: LayerRange(start, start + held.num_layers)}
