"""Wires: a message's bytes pass the sender's card, the link and the receiver's card, one at a time each.

Bytes flow through all three at once (cut-through), so an empty network adds bytes over the slowest of the three, and
the link's latency. Where messages meet, each of the three serves them in the order in which they come to it: what a
card carries at once is never more than its rate, and a message that waits for a slow link keeps no card from others.
A message is there when the last of the three has let its last byte through, so what one node sends to another arrives
in the order in which it was sent, as over a TCP connection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from helixbench.errors import InputError
from helixbench.profiler.cluster import COORDINATOR, ClusterProfile
from helixbench.solver.problem.links import LinkTable
from helixbench.solver.simulation.event_loop import ARRIVAL, WIRE, Kernel

Deliver: TypeAlias = Callable[[Any], None]


class _Channel:
    """Something that carries bytes one message at a time; ``None`` for no limit."""

    __slots__ = ("free_s", "rate")

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self.free_s = 0.0

    def take(self, at_s: float, size: float) -> tuple[float, float]:
        """When a message that comes at ``at_s`` begins to pass, and when it has passed."""
        if self.rate is None:
            return at_s, at_s
        begin_s = at_s if at_s > self.free_s else self.free_s
        self.free_s = end_s = begin_s + size / self.rate
        return begin_s, end_s


class _Way:
    """From one node to another: its three channels and its latency."""

    __slots__ = ("card_in", "card_out", "latency_s", "link")

    def __init__(self, card_out: _Channel, link: _Channel, card_in: _Channel, latency_s: float) -> None:
        self.card_out, self.link, self.card_in = card_out, link, card_in
        self.latency_s = latency_s


class Wires:
    """Carries messages between the nodes of a profile on the kernel's clock."""

    def __init__(self, profile: ClusterProfile, kernel: Kernel) -> None:
        self._kernel = kernel
        self._links = LinkTable(profile)
        coordinator = profile.coordinator
        cards = {COORDINATOR: (coordinator.nic_out_bytes_per_s, coordinator.nic_in_bytes_per_s)}
        cards |= {node.name: (node.nic_out_bytes_per_s, node.nic_in_bytes_per_s) for node in profile.nodes}
        self._out = {name: _Channel(rates[0]) for name, rates in cards.items()}
        self._in = {name: _Channel(rates[1]) for name, rates in cards.items()}
        self._ways: dict[tuple[str, str], _Way] = {}  # (from, to) -> way, made when first used

    def is_connected(self, src: str, dst: str) -> bool:
        """Whether there is a link."""
        return self._links.bandwidth(src, dst) is not None

    def send(self, src: str, dst: str, size: float, deliver: Deliver, message: Any) -> None:
        """Send ``size`` bytes now; ``deliver(message)`` happens when the last of them is there.

        Raises:
            InputError: the two are not connected.
        """
        way = self._ways.get((src, dst)) or self._open(src, dst)
        out_begin_s, out_end_s = way.card_out.take(self._kernel.now_s, size)
        link_begin_s, link_end_s = way.link.take(out_begin_s, size)
        there_s = (out_end_s if out_end_s > link_end_s else link_end_s) + way.latency_s
        if way.card_in.rate is None:
            self._kernel.at(there_s, ARRIVAL, deliver, message)
        else:  # who comes to the receiver's card first is known only then
            reaching = (way.card_in, size, there_s, deliver, message)
            self._kernel.at(link_begin_s + way.latency_s, WIRE, self._reach_card, reaching)

    def scale(self, src: str, dst: str, factor: float) -> None:
        """The link carries ``factor`` times its bandwidth of the profile; what was sent before is not affected.

        Raises:
            InputError: the two are not connected.
        """
        bandwidth = self._links.bandwidth(src, dst)
        if bandwidth is None:
            raise InputError(f"{src} -> {dst}: the cluster has no such link, so its bandwidth cannot change")
        way = self._ways.get((src, dst)) or self._open(src, dst)
        way.link.rate = bandwidth * factor

    def _reach_card(self, reaching: tuple[_Channel, float, float, Deliver, Any]) -> None:
        card_in, size, there_s, deliver, message = reaching
        _, in_end_s = card_in.take(self._kernel.now_s, size)
        self._kernel.at(there_s if there_s > in_end_s else in_end_s, ARRIVAL, deliver, message)

    def _open(self, src: str, dst: str) -> _Way:
        bandwidth, latency_s = self._links.bandwidth(src, dst), self._links.latency_s(src, dst)
        if bandwidth is None or latency_s is None:
            raise InputError(f"{src} -> {dst}: the cluster has no such link, but the plan sends requests over it")
        way = _Way(self._out[src], _Channel(bandwidth), self._in[dst], latency_s)
        self._ways[src, dst] = way
        return way
