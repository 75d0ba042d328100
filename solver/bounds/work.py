"""Upper bounds on the max-flow of any placement, found without search."""

from __future__ import annotations

from collections.abc import Iterable

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.problem.capacity import Capacities

ROUNDING = 1e-12
"""Relative. Where the bound is attained, work and need are equal over a whole interval of flows."""


def work_bound(capacities: Capacities, *, names: Iterable[str] | None = None) -> float:
    """The largest ``F`` with ``F * L <=`` work of all nodes (layers x tokens/s) when each carries at most ``F``.

    No link, no memory and NIC but each node's own, no fitting of ranges: every placement's max-flow is at most
    this. The work of a node at flow ``F`` is the best mix of the runs of layers it can do, in time at most one and flow
    at most ``F``.

    With time shared by runs of different length (partial inference, measured costs), a node may mix two of them.
    Placements of the nodes in ``names`` only, where those are given.
    """
    num_layers = capacities.model.num_layers
    workers = Workers(capacities, names=names)
    low, high = 0.0, workers.most()
    for _ in range(100):
        flow = (low + high) / 2
        if workers.work(flow) >= flow * num_layers * (1 - ROUNDING):
            low = flow
        else:
            high = flow
    return high


def coordinator_bound(capacities: Capacities) -> float:
    """Upper bound on the flow through the coordinator's NIC and its links to and from the nodes, tokens/s."""
    size, links = capacities.model.token_bytes, capacities.links
    names = [name for name in capacities.nodes if capacities.max_layers(name) > 0]
    sent = sum(links.bandwidth(COORDINATOR, name) or 0.0 for name in names)
    received = sum(links.bandwidth(name, COORDINATOR) or 0.0 for name in names)
    return min(sent, received, *(nic for nic in links.nics(COORDINATOR) if nic is not None)) / size


class Workers:
    """Nodes by kind, and what work they can do at a flow."""

    def __init__(self, capacities: Capacities, *, names: Iterable[str] | None = None) -> None:
        self._counts: dict[int, int] = {}
        self._points: dict[int, list[tuple[int, float]]] = {}  # kind -> (layers run, seconds per token)
        self._mixes: dict[int, bool] = {}  # kind -> whether one node can run ranges of several lengths
        for name in capacities.nodes if names is None else names:
            kind = capacities.kind(name)
            self._counts[kind] = self._counts.get(kind, 0) + 1
            if kind not in self._points:
                self._mixes[kind] = capacities.mixes_entries(name)
                self._points[kind] = _runs(capacities, name, mixes=self._mixes[kind])

    def most(self) -> float:
        """Work of all when each runs what it runs best, layers x tokens/s."""
        return sum(
            count * max((k / t for k, t in self._points[kind]), default=0.0) for kind, count in self._counts.items()
        )

    def work(self, flow: float) -> float:
        """Work of all when none carries more than ``flow`` tokens/s, layers x tokens/s."""
        return sum(
            count * _work(self._points[kind], flow, mixes=self._mixes[kind]) for kind, count in self._counts.items()
        )


def best_rates(capacities: Capacities, name: str) -> tuple[float, ...]:
    """Tokens/s of a node with 1, 2, ... layers held and entered at the start, wherever they lie best; 0: cannot."""
    seconds = dict(_runs(capacities, name, mixes=False))
    longest = max(seconds, default=0)
    return tuple(1.0 / seconds[k] if k in seconds else 0.0 for k in range(1, longest + 1))


def nic_limits(capacities: Capacities, name: str) -> tuple[float, float]:
    """(out, in): tokens/s that a node's NIC sends to and receives from other nodes; infinite where none is known."""
    size = capacities.model.activation_bytes_per_token
    out, in_ = (float("inf") if nic is None else nic / size for nic in capacities.links.nics(name))
    return out, in_


def _runs(capacities: Capacities, name: str, *, mixes: bool) -> list[tuple[int, float]]:
    """(layers, least seconds per token over where they lie) of every run that the node can do."""
    best: dict[int, float] = {}
    num_layers = capacities.model.num_layers
    # Tokens come in from a node or go out to one, unless the range is the whole model. Entries of different cost share
    # time, which is no share of the NIC: there it is left out.
    least = 0.0 if mixes else 1.0 / max(nic_limits(capacities, name))
    for length in range(1, min(capacities.nodes[name].max_layers, num_layers) + 1):
        for held in capacities.places(name, length):
            for entry in range(held.start, held.end) if mixes else (held.start,):
                seconds = 1.0 / capacities.tokens_per_s(name, held, entry)
                if length < num_layers:
                    seconds = max(seconds, least)
                run = held.end - entry
                best[run] = min(best.get(run, seconds), seconds)
    return sorted(best.items())


def _work(points: list[tuple[int, float]], flow: float, *, mixes: bool) -> float:
    """Most layers x tokens/s with time at most 1 and at most ``flow`` tokens/s: the LP's optimum mixes two runs."""
    best = max((k * min(1.0 / t, flow) for k, t in points), default=0.0)
    if not mixes:
        return best
    fast = [(k, t) for k, t in points if t * flow < 1.0]
    slow = [(k, t) for k, t in points if t * flow > 1.0]
    for k1, t1 in fast:
        for k2, t2 in slow:
            # Of the tokens in the slower run, so that time and flow are both full.
            share = (1.0 / flow - t1) / (t2 - t1)
            best = max(best, flow * ((1 - share) * k1 + share * k2))
    return best
