"""The network of a placement: a ``networkx.DiGraph`` with ``capacity`` in tokens/s on its edges.

A node is two vertices, ``(name, "in")`` and ``(name, "out")``; the edge between them is its time and its NIC. An edge
from one node's ``out`` to another's ``in`` is a link that a request can take: it leaves ``src`` where the range of
``src`` ends and enters ``dst`` there. The coordinator is where flow begins (``SOURCE``) and where it ends (``SINK``).

Two resources need not be one number on one edge. With partial inference, requests that enter a profiled node at
different layers take different shares of its time; and the NIC of a node that is entered from the coordinator receives
token ids from there but hidden states from other nodes. Such a resource is a ``Mixed`` constraint over the edges into
the node. A network without any is *pure*: its max-flow is a graph problem. With some it is a linear program.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange

if TYPE_CHECKING:
    import networkx as nx

ResourceKind: TypeAlias = Literal["node", "link", "nic out", "nic in"]
Resource: TypeAlias = tuple[ResourceKind, str]
"""Kind, and the node or ``src -> dst`` that it belongs to."""

Vertex: TypeAlias = tuple[str, str]
Edge: TypeAlias = tuple[Vertex, Vertex]

SOURCE: Vertex = (COORDINATOR, "source")
SINK: Vertex = (COORDINATOR, "sink")

UNITS_PER_TOKEN = 2**30
"""Capacities are also whole numbers of this unit: with floats, preflow-push can end in an error over an excess of 1e-11
tokens/s (networkx issue 7775), and whether an edge is full is not exact."""


@dataclass(frozen=True)
class Mixed:
    """A resource of which edges take different shares: ``use`` maps edge -> share that one token/s over it takes.

    The shares of all edges' flows add up to at most one.
    """

    resource: Resource
    use: Mapping[Edge, float]


@dataclass(frozen=True)
class Network:
    """The graph, and what its edges' capacities do not say.

    Attributes:
        placement: node -> layer range.
        graph: edge attributes are ``capacity`` (tokens/s), ``units`` (the same in whole units), ``limits`` (resource ->
            tokens/s, of which the least is the capacity) and, on a link, ``entry``: the layer where it enters ``dst``.
            An edge without limits has neither capacity nor units.
        mixed: constraints beside the capacities.
    """

    placement: Mapping[str, LayerRange]
    graph: nx.DiGraph[Vertex]
    mixed: tuple[Mixed, ...]

    @property
    def is_pure(self) -> bool:
        """Whether there is nothing but capacities."""
        return not self.mixed

    @property
    def links(self) -> list[tuple[str, str, int, Edge]]:
        """(src, dst, entry layer, edge) of each link."""
        edges = self.graph.edges(data=True)
        return [(a[0], b[0], at["entry"], (a, b)) for a, b, at in edges if "entry" in at]

    def limits(self) -> Iterator[tuple[Edge, Resource, float]]:
        """(edge, resource, tokens/s) of each resource that is a capacity of an edge."""
        for tail, head, attributes in self.graph.edges(data=True):
            for resource, tokens_per_s in attributes["limits"].items():
                yield (tail, head), resource, tokens_per_s

    def scaled(self, factors: Mapping[Resource, float]) -> Network:
        """The network with resources ``factor`` times as large, and the placement as it is."""
        graph = self.graph.copy()
        for edge, resource, tokens_per_s in list(self.limits()):
            if resource in factors:
                limits = graph.edges[edge]["limits"]
                _set_limits(graph, edge, {**limits, resource: tokens_per_s * factors[resource]})
        mixed = tuple(
            Mixed(m.resource, {edge: share / factors.get(m.resource, 1.0) for edge, share in m.use.items()})
            for m in self.mixed
        )
        return Network(self.placement, graph, mixed)


def build_network(capacities: Capacities, placement: Mapping[str, LayerRange]) -> Network:
    """The network of a placement."""
    import networkx as nx

    graph: nx.DiGraph[Vertex] = nx.DiGraph()
    graph.add_nodes_from((SOURCE, SINK))
    num_layers, by_name = capacities.model.num_layers, sorted(placement)
    enterable: dict[int, list[str]] = {}  # layer -> nodes that can be entered there
    for name in by_name:
        for entry in capacities.entries(placement[name]):
            enterable.setdefault(entry, []).append(name)
    for src in (COORDINATOR, *by_name):
        leaves_at = 0 if src == COORDINATOR else placement[src].end
        # From the coordinator a request enters at layer 0, so only where a range starts: entering there is no skip.
        for dst in [COORDINATOR] if leaves_at == num_layers else enterable.get(leaves_at, []):
            bandwidth = capacities.links.bandwidth(src, dst)
            if bandwidth is not None:
                edge = ((src, "out"), (dst, "in"))
                graph.add_edge(*edge, entry=leaves_at)
                carries = bandwidth / capacities.profile.bytes_per_token(src, dst)
                _set_limits(graph, edge, {("link", f"{src} -> {dst}"): carries})
    nic_out, nic_in = capacities.links.nics(COORDINATOR)
    outward, inward = (SOURCE, (COORDINATOR, "out")), ((COORDINATOR, "in"), SINK)
    ends: tuple[tuple[Edge, Resource, float | None], ...] = (
        (outward, ("nic out", COORDINATOR), nic_out),
        (inward, ("nic in", COORDINATOR), nic_in),
    )
    for edge, resource, nic in ends:
        graph.add_edge(*edge)
        _set_limits(graph, edge, {} if nic is None else {resource: nic / capacities.model.token_bytes})
    mixed = [found for name in by_name for found in _add_node(graph, capacities, name, placement[name])]
    return Network(dict(placement), graph, tuple(mixed))


def _add_node(graph: nx.DiGraph[Vertex], capacities: Capacities, name: str, held: LayerRange) -> Iterator[Mixed]:
    """Add the edge through a node; what of its resources is no single number comes back as constraints."""
    profile = capacities.profile
    nic_out, nic_in = capacities.links.nics(name)
    entrance, exit_ = (name, "in"), (name, "out")
    graph.add_nodes_from((entrance, exit_))
    into: dict[Edge, int] = {(tail, entrance): at["entry"] for tail, _, at in graph.in_edges(entrance, data=True)}
    out_of = list(graph.out_edges(exit_))
    alone: dict[Resource, dict[Edge, float]] = {  # resource -> edge -> tokens/s if the edge had all of it
        ("node", name): {edge: capacities.tokens_per_s(name, held, entry) for edge, entry in into.items()}
    }
    most = max(alone["node", name].values(), default=0.0)
    if nic_in is not None:
        received = {edge: nic_in / profile.bytes_per_token(edge[0][0], name) for edge in into}
        # A NIC that keeps up even if all of its messages were of the larger size never binds: no constraint.
        if len(set(received.values())) == 1 or min(received.values(), default=most) < most:
            alone["nic in", name] = received
    if nic_out is not None:
        # All that leaves a node is of one size: it ends where the model does, or it does not.
        alone["nic out", name] = {e: nic_out / profile.bytes_per_token(name, e[1][0]) for e in out_of}
    limits: dict[Resource, float] = {}
    for resource, carries in alone.items():
        if len(set(carries.values())) > 1:
            yield Mixed(resource, {edge: 1.0 / tokens_per_s for edge, tokens_per_s in carries.items()})
        elif carries:
            limits[resource] = next(iter(carries.values()))
    graph.add_edge(entrance, exit_)
    _set_limits(graph, (entrance, exit_), limits)


def _set_limits(graph: nx.DiGraph[Vertex], edge: Edge, limits: Mapping[Resource, float]) -> None:
    attributes: dict[str, object] = {"limits": dict(limits)}
    if limits:
        capacity = min(limits.values())
        attributes |= {"capacity": capacity, "units": int(capacity * UNITS_PER_TOKEN)}
    graph.edges[edge].update(attributes)
