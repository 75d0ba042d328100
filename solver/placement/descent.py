"""Better neighbours of the best placement, and of places a few moves away from it, until time is up."""

from __future__ import annotations

import random

from helixbench.solver.placement.incumbent import Search
from helixbench.solver.placement.neighbours import neighbours
from helixbench.solver.problem.plan import Placement

VAIN_KICKS_PER_NODE = 5
"""So many starts away from the best for each node, without finding a better one, end the search."""


def walk(search: Search) -> None:
    """Better neighbours until there are none; then again from the best, a few moves away from it."""
    if search.best is None:
        return
    end_s = search.elapsed() + search.left()
    if not search.is_for_flow:
        end_s = min(end_s, 0.7 * search.limits.time_s)
    rng = random.Random(search.limits.seed)
    _descend(search, search.best, search.best_score, end_s)
    vain = 0
    most_vain = VAIN_KICKS_PER_NODE * len(search.question.capacities.nodes)
    while vain < most_vain and search.elapsed() < end_s and not search.is_over:
        before = search.best_score
        kicked = _kick(search, rng, end_s)
        if kicked is None:
            return
        score = search.score(kicked, above=0.5 * before, doing="neighbours")
        if score is not None:
            _descend(search, kicked, score, end_s)
        vain = 0 if search.best_score > before else vain + 1


def _descend(search: Search, start: Placement, score: float, end_s: float) -> None:
    """From one placement to better neighbours, the first that is better each time."""
    here, is_better = start, True
    while is_better and not search.is_over:
        is_better = False
        for candidate in neighbours(search.question.capacities, here):
            if search.elapsed() >= end_s:
                return
            found = search.score(candidate, above=score, doing="neighbours")
            if found is not None:
                here, score, is_better = candidate, found, True
                break


def _kick(search: Search, rng: random.Random, end_s: float) -> Placement | None:
    """The best with a few random neighbouring moves made on it; ``None`` where time is up before they are listed."""
    assert search.best is not None
    here = search.best
    for _ in range(rng.randint(2, 4)):
        around = []
        for candidate in neighbours(search.question.capacities, here):
            if search.elapsed() >= end_s:
                return None
            around.append(candidate)
        if around:
            here = rng.choice(around)
    return here
