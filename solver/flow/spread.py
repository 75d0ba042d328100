"""Of all largest flows, the one to route by: it uses the nodes' time and their KV caches as evenly as it can.

A flow that is largest leaves much open, for only the nodes of the min cut are full. Routing follows it, and a node that
it passes over holds no requests: late entry lets it wind through two branches by turns, so that at some layers a node
of one branch holds the caches of all requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.flow.network import Network, Resource
from helixbench.solver.problem.capacity import Capacities, admitted_requests
from helixbench.solver.problem.plan import LayerRange

USE_STEPS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Where the price of a use rises; within a step all spreads cost the same."""

OVERFULL_PRICE = 2.0
"""Of a token that passes a cache which is full already; one that fills it to the brim costs 1."""


def cache_shares(capacities: Capacities, placement: Mapping[str, LayerRange]) -> dict[str, float]:
    """Node -> share of all requests in flight that its KV cache has room for; more than 1 where it holds them all.

    In flight are as many as the layer with least room admits, or those asked for where they are fewer.
    """
    room = {name: admitted_requests(capacities, name, held) for name, held in placement.items()}
    by_layer = [0.0] * capacities.model.num_layers
    for name, held in placement.items():
        for layer in range(held.start, held.end):
            by_layer[layer] += room[name]
    in_flight = max(1.0, min(by_layer))
    if capacities.concurrency is not None:
        in_flight = min(in_flight, capacities.concurrency)
    return {name: requests / in_flight for name, requests in room.items()}


def prefer_even_use(
    highs: Any,
    network: Network,
    shared: Sequence[Resource],
    shares: Mapping[str, float],
    *,
    best: float,
    scale: float,
) -> None:
    """Turn the max-flow's LP into one for the flow of the same size that costs least.

    Each use ``u`` of a node's time or cache costs the flow that would fill it times a convex function of ``u`` (about
    ``u^2 / 2``, in straight steps): a token costs the same on two nodes that are equally used.

    Args:
        highs: the solved LP; rows of ``shared`` first, one column for each arc.
        network: of the placement.
        shared: the resources that have rows.
        shares: see ``cache_shares``.
        best: the size of the flow, in units of ``scale``.
        scale: tokens/s that the LP counts as one.
    """
    sources = [number for number, arc in enumerate(network.arcs) if arc.src == COORDINATOR]
    num_arcs = len(network.arcs)
    highs.addRow(best, np.inf, len(sources), np.array(sources), np.ones(len(sources)))
    highs.changeColsCost(num_arcs, np.arange(num_arcs, dtype=np.int32), np.zeros(num_arcs))
    for row, resource in enumerate(shared):
        if resource.kind == "node":
            # use - sum(steps) <= 0, steps <= their widths: the row's limit of one moves into the widths.
            highs.changeRowBounds(row, -np.inf, 0.0)
            _add_steps(highs, row, full=1.0 / (min(share for _, share in resource.use) * scale))
    into: dict[str, list[int]] = {}
    for number, arc in enumerate(network.arcs):
        if arc.dst != COORDINATOR:
            into.setdefault(arc.dst, []).append(number)
    for name in sorted(into):
        held, full = network.placement[name], best * shares[name]
        if full <= 0:
            continue
        # A request that enters late takes room at the layers that it runs alone.
        use = [(held.end - network.arcs[number].entry) / held.num_layers / full for number in into[name]]
        row = highs.getNumRow()
        highs.addRow(-np.inf, 0.0, len(use), np.array(into[name], dtype=np.int32), np.array(use))
        _add_steps(highs, row, full=full)
        _add_step(highs, row, price=OVERFULL_PRICE * full, width=np.inf)


def _add_steps(highs: Any, row: int, *, full: float) -> None:
    below = 0.0
    for step in USE_STEPS:
        _add_step(highs, row, price=full * (below + step) / 2, width=step - below)
        below = step


def _add_step(highs: Any, row: int, *, price: float, width: float) -> None:
    highs.addCol(-price, 0.0, width, 1, np.array([row], dtype=np.int32), np.array([-1.0]))
