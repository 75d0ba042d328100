"""The placements that promise most, by means alone or by their flow, compared by following their requests."""

from __future__ import annotations

from helixbench.solver.expected.simulated import best_limits
from helixbench.solver.flow.max_flow import largest_flow
from helixbench.solver.placement.incumbent import Search
from helixbench.solver.problem.plan import Placement

MOST_OF_EACH = 16
"""So many placements are followed of those that means alone find best, and of those with the largest flow."""

MOST_WORK = 6_000_000
"""Events and tokens of all their rollouts; some ten seconds."""


def roll_out_leaders(search: Search) -> None:
    """Follow the requests of the placements that promise most; keep the one that delivers most.

    The best by means stays where some of them take too long to follow: short pipelines are followed soonest, and would
    otherwise be compared with their like alone.
    """
    question = search.question
    rolled: list[tuple[float, float, Placement]] = []
    work = 0
    for _, flow, placement in _leaders(search):
        if rolled and (search.left() <= 0 or work > MOST_WORK):
            break
        carried = largest_flow(question, placement, spread=True)
        held = carried.used(placement)
        found = best_limits(question, held, carried, thorough=False)
        if found is not None:
            work += found.work
            rolled.append((found.expected.total_tokens_per_s, flow, placement))
        else:
            return
    if rolled:
        search.take(*max(rolled, key=lambda item: item[0]))
        search.tell("following requests through the best plans")


def _leaders(search: Search) -> list[tuple[float, float, Placement]]:
    """Best by means of each set of nodes, best by means, largest flow: each in its order, and each placement once."""
    by_means = sorted(search.leaders, key=lambda leader: -leader[0])
    by_flow = sorted(search.leaders, key=lambda leader: -leader[1])
    by_nodes: dict[frozenset[str], tuple[float, float, Placement]] = {}
    for leader in by_means:
        by_nodes.setdefault(frozenset(leader[2]), leader)
    chosen = list(by_nodes.values())[: MOST_OF_EACH // 2]
    for mean, flow in zip(by_means, by_flow, strict=True):
        if len(chosen) >= 2 * MOST_OF_EACH:
            break
        chosen += [leader for leader in (mean, flow) if leader not in chosen]
    return chosen
