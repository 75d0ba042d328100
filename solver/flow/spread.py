"""Of all largest flows, the one to route by: it uses the nodes' time and their KV caches as evenly as it can.

A flow that is largest leaves much open, for only the nodes of the min cut are full. Routing follows it, and a node that
it passes over holds no requests: late entry lets it wind through two branches by turns, so that at some layers a node
of one branch holds the caches of all requests.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from helixbench.solver.flow.linear_program import FlowProgram
from helixbench.solver.flow.network import SOURCE, Edge, Network
from helixbench.solver.problem.capacity import Capacities, admitted_requests
from helixbench.solver.problem.plan import LayerRange

USE_STEPS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Where the price of a use rises; within a step all spreads cost the same."""

OVERFULL_PRICE = 2.0
"""Price of a token on a node whose cache is full already; the token that just fills it costs 1."""


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


def evenest_flow(network: Network, shares: Mapping[str, float], tokens_per_s: float) -> dict[Edge, float]:
    """The flow of that size that uses nodes and caches most evenly: a second linear program over all of that size.

    Each use ``u`` of a node's time or cache costs the flow that would fill it times a convex function of ``u``, about
    ``u^2 / 2`` in straight steps: a token costs the same on two nodes that are equally used. A step is a column with
    the step's width as its bound and its slope as its price; convexity fills cheaper steps first.

    Args:
        network: of the placement.
        shares: see ``cache_shares``.
        tokens_per_s: its max-flow.
    """
    program = FlowProgram(network)
    best = tokens_per_s / program.scale
    sources = [number for number, (tail, _) in enumerate(program.edges) if tail == SOURCE]
    program.highs.addRow(best, np.inf, len(sources), np.array(sources), np.ones(len(sources)))
    num_edges = len(program.edges)
    program.highs.changeColsCost(num_edges, np.arange(num_edges, dtype=np.int32), np.zeros(num_edges))
    mixed = {m.resource: m.use for m in network.mixed}
    for name, held in sorted(network.placement.items()):
        into = [(tail, head) for tail, head in network.graph.in_edges((name, "in"))]
        if not into:
            continue
        time = mixed.get(("node", name))
        if time is None:
            full = network.graph.edges[(name, "in"), (name, "out")]["limits"]["node", name] / program.scale
            time = dict.fromkeys(into, 1.0 / full / program.scale)
        _add_use(program, {edge: share * program.scale for edge, share in time.items()})
        full = best * shares[name]
        if full > 0:
            # A request that enters late takes room at the layers that it runs alone.
            entry = {edge: network.graph.edges[edge]["entry"] for edge in into}
            _add_use(program, {edge: (held.end - entry[edge]) / held.num_layers / full for edge in into}, full=full)
    return dict(zip(program.edges, map(float, program.solve()), strict=True))


def _add_use(program: FlowProgram, use: Mapping[Edge, float], *, full: float | None = None) -> None:
    """A row ``use - sum(steps) <= 0``, and the steps. A cache, of which ``full`` is given, can be more than full."""
    row = program.highs.getNumRow()
    columns = np.array([program.column[edge] for edge in use], dtype=np.int32)
    program.highs.addRow(-np.inf, 0.0, len(use), columns, np.array(list(use.values())))
    flow = 1.0 / min(use.values()) if full is None else full
    below = 0.0
    for step in USE_STEPS:
        _add_step(program, row, price=flow * (below + step) / 2, width=step - below)
        below = step
    if full is not None:
        _add_step(program, row, price=OVERFULL_PRICE * full, width=np.inf)


def _add_step(program: FlowProgram, row: int, *, price: float, width: float) -> None:
    program.highs.addCol(-price, 0.0, width, 1, np.array([row], dtype=np.int32), np.array([-1.0]))
