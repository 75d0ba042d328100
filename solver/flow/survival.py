"""Whether a placement goes on after the loss of any one of its nodes: some pipeline is left each time (N-1 cover).

That every layer is held twice is necessary. It is enough where all nodes are connected and requests may enter a range
late; else the ranges that are left also have to join up over the links that there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Placement


def survives(capacities: Capacities, placement: Mapping[str, LayerRange]) -> bool:
    """Whether requests can be served after the loss of any one node."""
    return bool(placement) and not any(True for _ in indispensable(capacities, placement))


def indispensable(
    capacities: Capacities, placement: Mapping[str, LayerRange], *, all_connected: bool = False
) -> Iterator[str]:
    """The nodes without which no pipeline is left; with ``all_connected`` as if every two nodes had a link."""
    return (
        name
        for name in placement
        if not _has_pipeline(capacities, without(placement, name), all_connected=all_connected)
    )


def without(placement: Mapping[str, LayerRange], lost: str) -> Placement:
    """The placement without one node."""
    return {name: held for name, held in placement.items() if name != lost}


def _has_pipeline(capacities: Capacities, placement: Placement, *, all_connected: bool) -> bool:
    num_layers, links = capacities.model.num_layers, capacities.links

    def is_linked(src: str, dst: str) -> bool:
        return all_connected or links.bandwidth(src, dst) is not None

    unreached = dict(placement)
    waiting = [(COORDINATOR, 0)]
    while waiting:
        src, layer = waiting.pop()
        if layer == num_layers and is_linked(src, COORDINATOR):
            return True
        for dst, held in list(unreached.items()):
            if layer in capacities.entries(held) and is_linked(src, dst):
                waiting.append((dst, held.end))
                del unreached[dst]
    return False
