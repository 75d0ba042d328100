"""The flow network of a placement: which hops a request can take, and what each of them uses up.

An arc is a link that a request can take: it leaves the range that ``src`` holds at its end and enters ``dst`` there.
Everything that bounds the flow is a ``Resource``: a share of each arc's flow on it must not add up to more than one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange

ResourceKind = Literal["node", "link", "nic out", "nic in"]


@dataclass(frozen=True)
class Arc:
    """A hop from ``src`` into ``dst`` at layer ``entry`` (the last boundary when ``dst`` is the coordinator)."""

    src: str
    dst: str
    entry: int
    bytes_per_token: float
    capacity_tokens_per_s: float


@dataclass(frozen=True)
class Resource:
    """Something shared by arcs. ``use`` maps arc number -> share of the resource that one token/s on the arc takes."""

    kind: ResourceKind
    name: str
    use: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Network:
    """All arcs of a placement and all resources, in a fixed order."""

    placement: Mapping[str, LayerRange]
    num_layers: int
    arcs: tuple[Arc, ...]
    resources: tuple[Resource, ...]


def build_network(capacities: Capacities, placement: Mapping[str, LayerRange], *, partial: bool) -> Network:
    """The network of a placement.

    Args:
        capacities: of the nodes.
        placement: node -> layer range.
        partial: whether a request may enter a node after the first layer that it holds.
    """
    num_layers = capacities.model.num_layers
    by_name = sorted(placement)
    entering: dict[int, list[str]] = {}  # layer -> nodes that can be entered there
    for name in by_name:
        held = placement[name]
        for entry in range(held.start, held.end) if partial else (held.start,):
            entering.setdefault(entry, []).append(name)
    arcs: list[Arc] = []
    for src in (COORDINATOR, *by_name):
        leaves_at = 0 if src == COORDINATOR else placement[src].end
        targets = [COORDINATOR] if leaves_at == num_layers else entering.get(leaves_at, [])
        for dst in targets:
            # From the coordinator a request enters at layer 0, so only where a range starts: entering there is no skip.
            bandwidth = capacities.links.bandwidth(src, dst)
            if bandwidth is None:
                continue
            size = capacities.profile.bytes_per_token(src, dst)
            arcs.append(Arc(src, dst, leaves_at, size, bandwidth / size))
    return Network(dict(placement), num_layers, tuple(arcs), _resources(capacities, placement, arcs))


def _resources(capacities: Capacities, placement: Mapping[str, LayerRange], arcs: list[Arc]) -> tuple[Resource, ...]:
    into: dict[str, list[int]] = {}
    out_of: dict[str, list[int]] = {}
    for number, arc in enumerate(arcs):
        into.setdefault(arc.dst, []).append(number)
        out_of.setdefault(arc.src, []).append(number)
    found: list[Resource] = []
    for name in sorted(placement):
        use = tuple(
            (number, 1.0 / capacities.tokens_per_s(name, placement[name], arcs[number].entry))
            for number in into.get(name, [])
        )
        found.append(Resource("node", name, use))
    cards = {node.name: (node.nic_out_bytes_per_s, node.nic_in_bytes_per_s) for node in capacities.profile.nodes}
    coordinator = capacities.profile.coordinator
    cards[COORDINATOR] = (coordinator.nic_out_bytes_per_s, coordinator.nic_in_bytes_per_s)
    for name in (COORDINATOR, *sorted(placement)):
        sent, received = cards[name]
        if sent is not None:
            found.append(Resource("nic out", name, _bytes_use(arcs, out_of.get(name, []), sent)))
        if received is not None:
            found.append(Resource("nic in", name, _bytes_use(arcs, into.get(name, []), received)))
    for number, arc in enumerate(arcs):
        found.append(Resource("link", f"{arc.src} -> {arc.dst}", ((number, 1.0 / arc.capacity_tokens_per_s),)))
    return tuple(found)


def _bytes_use(arcs: list[Arc], numbers: list[int], bytes_per_s: float) -> tuple[tuple[int, float], ...]:
    return tuple((number, arcs[number].bytes_per_token / bytes_per_s) for number in numbers)
