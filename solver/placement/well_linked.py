"""Nodes that are fit to be one of many: those whose links to the other nodes of their region are not far slower.

Segments and chains are planned as if all links inside a region were alike. A node behind a slow link would be given a
share that it cannot pass on, so they are planned without such nodes; the searches that follow know each link.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from helixbench.solver.problem.capacity import Capacities

FAR_SLOWER = 0.5
"""Of what links of the region's nodes carry in the middle, or of the flow that is aimed at if that is less."""

FEWEST = 3
"""Nodes of a region, below which none can be told apart from the others."""


def well_linked(capacities: Capacities, flow: float) -> list[str]:
    """The nodes that are not behind links far slower than their region's, in their order.

    Args:
        capacities: of the nodes.
        flow: tokens/s; links that carry it are fast enough.
    """
    region = {name: node.region for name, node in capacities.nodes.items()}
    links = capacities.profile.links
    if not any(link.src in region and region[link.src] == region.get(link.dst) for link in links):
        return list(region)  # all links inside a region are the default one
    members: dict[str, list[str]] = {}
    for name, place in region.items():
        members.setdefault(place, []).append(name)
    slow: set[str] = set()
    for names in members.values():
        if len(names) >= FEWEST:
            slow |= _far_slower({name: _in_the_middle(capacities, name, names) for name in names}, flow)
    return [name for name in region if name not in slow]


def _far_slower(rates: Mapping[str, float], flow: float) -> set[str]:
    least = FAR_SLOWER * min(flow, statistics.median(rates.values()))
    return {name for name, rate in rates.items() if rate < least}


def _in_the_middle(capacities: Capacities, name: str, names: Sequence[str]) -> float:
    """Tokens/s of the node's links to and from the others in the middle, the slower way of each."""
    links, size = capacities.links, capacities.model.activation_bytes_per_token
    others = [other for other in names if other != name]
    both_ways = [min(links.bandwidth(name, other) or 0.0, links.bandwidth(other, name) or 0.0) for other in others]
    return statistics.median(both_ways) / size
