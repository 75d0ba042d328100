"""The placements that means alone find best, compared by following their groups of requests."""

from __future__ import annotations

from .assemble import best_limits, carrying, used_nodes
from .incumbent import Search
from .plan import LayerRange

Placement = dict[str, LayerRange]

MAX_ROLLED_OUT = 8
"""So many of the placements that means alone find best are compared by following their groups of requests."""


def roll_out_leaders(search: Search) -> None:
    """Compare the placements that means alone find best by following their groups of requests; keep the best."""
    question = search.question
    rolled: list[tuple[float, float, Placement]] = []
    for _, flow, placement in _leaders(search):
        if rolled and search.left() <= 0:
            break
        carried = carrying(question, placement, spread=True, links=search.links)
        held = {name: placement[name] for name in used_nodes(placement, carried)}
        found = best_limits(question, held, carried, thorough=False)
        if found is not None:
            rolled.append((found[1].total_tokens_per_s, flow, placement))
        elif not rolled:
            break  # too many in flight to follow any of them
    if rolled:
        search.take(*max(rolled, key=lambda item: item[0]))
        search.tell("following requests through the best plans")


def _leaders(search: Search) -> list[tuple[float, float, Placement]]:
    """The best placement by means of each set of nodes, best first: near copies of the best would crowd out others."""
    by_nodes: dict[frozenset[str], tuple[float, float, Placement]] = {}
    for leader in search.leaders:
        nodes = frozenset(leader[2])
        if nodes not in by_nodes or leader[0] > by_nodes[nodes][0]:
            by_nodes[nodes] = leader
    return sorted(by_nodes.values(), key=lambda leader: -leader[0])[:MAX_ROLLED_OUT]
