"""The exact max-flow of a placement, and the proof of it: its min cut.

Where the network is pure, by preflow-push on the graph (networkx); the cut is the capacities of the edges that leave
the vertices still reachable from the source. Where resources are mixed, by a linear program, whose duals are the cut:
shares of full resources that add up to the flow itself. Routing follows the flow, so of all largest flows a plan takes
the one that spreads work most evenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.flow.linear_program import FlowProgram
from helixbench.solver.flow.network import (
    SINK,
    SOURCE,
    UNITS_PER_TOKEN,
    Edge,
    Network,
    Resource,
    ResourceKind,
    build_network,
)
from helixbench.solver.flow.spread import cache_shares, evenest_flow
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, LinkFlow, Placement

RELATIVE_TOLERANCE = 1e-9
"""Share of the largest flow on an edge below which a flow, or a share of the cut, is a rounding error."""


@dataclass(frozen=True)
class CutShare:
    """A full resource in the min cut, and the tokens/s of the max-flow that it accounts for.

    A resource that is x % larger raises the max-flow by at most x % of ``tokens_per_s``.
    """

    kind: ResourceKind
    name: str
    tokens_per_s: float


@dataclass(frozen=True)
class Flow:
    """A largest flow of a placement.

    Attributes:
        tokens_per_s: what leaves the coordinator.
        links: the links that carry some of it.
        entries: (node, entry layer) -> tokens/s; the range starts there or, with partial inference, later.
        cut: its min cut; the shares add up to ``tokens_per_s``.
        on_edge: edge of the network -> tokens/s.
    """

    tokens_per_s: float
    links: tuple[LinkFlow, ...]
    entries: Mapping[tuple[str, int], float]
    cut: tuple[CutShare, ...]
    on_edge: Mapping[Edge, float]

    def used(self, placement: Mapping[str, LayerRange]) -> Placement:
        """The placement without the nodes that carry none of it, by name."""
        carrying = {name for name, _ in self.entries}
        return {name: placement[name] for name in sorted(placement) if name in carrying}

    def through(self, name: str) -> float:
        """Tokens/s through a node, over all entries."""
        return sum(flow for (node, _), flow in self.entries.items() if node == name)


def max_flow(capacities: Capacities, placement: Mapping[str, LayerRange], *, spread: bool = False) -> Flow:
    """The largest flow coordinator -> ... -> coordinator that the placement can carry; 0 where no path exists.

    With ``spread`` the one among the largest that uses the nodes most evenly; it takes a second solve.
    """
    network = build_network(capacities, placement)
    return solve_network(network, shares=cache_shares(capacities, placement) if spread else None)


def solve_network(network: Network, *, shares: Mapping[str, float] | None = None) -> Flow:
    """The largest flow through a network, with its cut; see ``max_flow``. It is spread where cache shares are given."""
    solve = _by_preflow_push if network.is_pure else _by_program
    on_edge, cut = solve(network)
    total = sum(flow for (tail, _), flow in on_edge.items() if tail == SOURCE)
    if shares is not None and total > 0:
        on_edge = evenest_flow(network, shares, total)
    return _as_flow(network, on_edge, cut)


def _by_preflow_push(network: Network) -> tuple[dict[Edge, float], dict[Resource, float]]:
    import networkx as nx
    from networkx.algorithms.flow import preflow_push

    residual = preflow_push(network.graph, SOURCE, SINK, capacity="units")
    on_edge = dict.fromkeys(network.graph.edges, 0.0)
    for tail, head in on_edge.keys() & residual.edges:  # it leaves out edges of no capacity
        on_edge[tail, head] = residual.edges[tail, head]["flow"] / UNITS_PER_TOKEN
    open_edges = nx.subgraph_view(
        residual, filter_edge=lambda a, b: residual.edges[a, b]["flow"] < residual.edges[a, b]["capacity"]
    )
    reached = {SOURCE, *nx.descendants(open_edges, SOURCE)}
    cut: dict[Resource, float] = {}
    for edge in nx.edge_boundary(network.graph, reached):
        limits = network.graph.edges[edge]["limits"]
        cut[min(limits, key=limits.__getitem__)] = on_edge[edge]
    return on_edge, cut


def _by_program(network: Network) -> tuple[dict[Edge, float], dict[Resource, float]]:
    program = FlowProgram(network)
    flows = program.solve()
    of_mixed, of_edges = map(list, program.prices())
    cut = {mixed.resource: float(price) for mixed, price in zip(network.mixed, of_mixed, strict=True)}
    for edge, price in zip(program.edges, of_edges, strict=True):
        limits = network.graph.edges[edge]["limits"]
        if limits:
            cut[min(limits, key=limits.__getitem__)] = float(price)
    return dict(zip(program.edges, map(float, flows), strict=True)), cut


def _as_flow(network: Network, on_edge: Mapping[Edge, float], cut: Mapping[Resource, float]) -> Flow:
    least = RELATIVE_TOLERANCE * max(on_edge.values(), default=0.0)
    entries: dict[tuple[str, int], float] = {}
    links: list[LinkFlow] = []
    total = 0.0
    for src, dst, entry, edge in network.links:
        amount = on_edge[edge]
        if amount <= least:
            continue
        capacity = network.graph.edges[edge]["capacity"]
        links.append(LinkFlow(src=src, dst=dst, flow_tokens_per_s=amount, capacity_tokens_per_s=capacity))
        if src == COORDINATOR:
            total += amount
        if dst != COORDINATOR:
            entries[dst, entry] = entries.get((dst, entry), 0.0) + amount
    shares = [CutShare(kind, name, tokens_per_s) for (kind, name), tokens_per_s in cut.items() if tokens_per_s > least]
    shares.sort(key=lambda share: (-share.tokens_per_s, share.kind, share.name))
    return Flow(total, tuple(links), entries, tuple(shares), on_edge)
