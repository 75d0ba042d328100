"""Local search: better neighbours of the best placement, and of places a few moves away from it, until time is up."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from helixbench.solver.placement.incumbent import Search
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Placement

VAIN_KICKS_PER_NODE = 5
"""So many starts away from the best for each node, without finding a better one, end the search of a plan whose gap is
small; each as many more let the starts be a move further away."""

OPEN_GAP = 0.02
"""Relative gap of the max-flow from which the time that was given is used."""

FEWEST_MOVES = 2
"""Of a start away from the best."""


def search_neighbourhood(search: Search) -> None:
    """Descend to a local optimum; then again from the best, a few random moves away from it (iterated local search)."""
    if search.best is None:
        return
    end_s = search.elapsed() + search.left()
    if not search.is_for_flow:
        end_s = min(end_s, 0.7 * search.limits.time_s)  # the rest is for simulating the best
    rng = random.Random(search.limits.seed)
    _descend(search, search.best, search.best_score, end_s)
    vain = 0
    most_vain = VAIN_KICKS_PER_NODE * len(search.capacities.nodes)
    while search.elapsed() < end_s and not search.is_over:
        is_open = search.is_for_flow and search.bound > search.best_flow * (1 + OPEN_GAP)
        if vain >= most_vain and not is_open:
            return
        before = search.best_score
        kicked = _kick(search, rng, end_s, most_moves=FEWEST_MOVES + 2 + vain // most_vain)
        if kicked is None:
            return
        # A kick may lose up to half: what counts is where the descent from it ends.
        score = search.score(kicked, above=0.5 * before, doing="neighbours")
        if score is not None:
            _descend(search, kicked, score, end_s)
        vain = 0 if search.best_score > before else vain + 1


def _descend(search: Search, start: Placement, score: float, end_s: float) -> None:
    """From one placement to better neighbours, the first that is better each time."""
    here, is_better = start, True
    while is_better and not search.is_over:
        is_better = False
        for candidate in neighbours(search.capacities, here):
            if search.elapsed() >= end_s:
                return
            found = search.score(candidate, above=score, doing="neighbours")
            if found is not None:
                here, score, is_better = candidate, found, True
                break


def _kick(search: Search, rng: random.Random, end_s: float, *, most_moves: int) -> Placement | None:
    """The best with a few random moves made on it; ``None`` where time is up before they are listed."""
    assert search.best is not None
    here = search.best
    for _ in range(rng.randint(FEWEST_MOVES, most_moves)):
        around = []
        for candidate in neighbours(search.capacities, here):
            if search.elapsed() >= end_s:
                return None
            around.append(candidate)
        if around:
            here = rng.choice(around)
    return here


def neighbours(capacities: Capacities, placement: Mapping[str, LayerRange]) -> Iterator[Placement]:
    """Neighbours in a fixed order, those that change least first; each holds only what its nodes can."""
    for moves in (_moved_boundaries, _swaps, _without_one, _one_elsewhere):
        for candidate in moves(capacities, placement):
            if all(capacities.can_hold(name, held) for name, held in candidate.items()):
                yield candidate


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
    """Two nodes of different kinds take each other's ranges; one may be unused."""
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


def _without_one(_: Capacities, placement: Mapping[str, LayerRange]) -> Iterator[Placement]:
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
