"""Simulated links: a message's bytes pass the sender's NIC, the link and the receiver's NIC, in order of arrival each.

Bytes flow through all three at once (cut-through), so in an empty network a message takes its bytes over the slowest of
the three, and the link's latency. Where messages meet, each of the three serves them in the order in which they reach
it: a NIC never carries more than its rate, and a message that waits for a slow link does not block others. A message
has arrived when its last byte has passed the last of the three and the server's transport has read it, one message of a
link after the other. So what one node sends to another arrives in the order
in which it was sent, as over a TCP connection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from helixbench.errors import InputError
from helixbench.profiler.cluster import COORDINATOR, ClusterProfile
from helixbench.solver.problem.links import LinkTable
from helixbench.solver.simulation.event_loop import ARRIVAL, WIRE, EventLoop

Deliver: TypeAlias = Callable[[Any], None]


class _Channel:
    """Carries bytes of one message at a time at ``rate`` bytes/s; ``None`` for no limit."""

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


class _Path:
    """From one node to another: its three channels, its latency, and the transport that reads what arrives."""

    __slots__ = ("latency_s", "link", "nic_in", "nic_out", "transport")

    def __init__(
        self, nic_out: _Channel, link: _Channel, nic_in: _Channel, transport: _Channel, latency_s: float
    ) -> None:
        self.nic_out, self.link, self.nic_in, self.transport = nic_out, link, nic_in, transport
        self.latency_s = latency_s


class SimulatedLinks:
    """Carries messages between the nodes of a profile on the event loop's clock."""

    def __init__(self, profile: ClusterProfile, loop: EventLoop) -> None:
        self._loop = loop
        self._links = LinkTable(profile)
        coordinator = profile.coordinator
        rates = {COORDINATOR: (coordinator.nic_out_bytes_per_s, coordinator.nic_in_bytes_per_s)}
        rates |= {node.name: (node.nic_out_bytes_per_s, node.nic_in_bytes_per_s) for node in profile.nodes}
        self._out = {name: _Channel(out) for name, (out, _) in rates.items()}
        self._in = {name: _Channel(received) for name, (_, received) in rates.items()}
        self._held: dict[tuple[str, str], list[tuple[float, Deliver, Any]]] = {}  # link that is cut -> what was sent
        self._paths: dict[tuple[str, str], _Path] = {}  # (from, to) -> path, made when first used

    def is_connected(self, src: str, dst: str) -> bool:
        """Whether there is a link."""
        return self._links.bandwidth(src, dst) is not None

    def send(self, src: str, dst: str, size: float, deliver: Deliver, message: Any) -> None:
        """Send ``size`` bytes now; ``deliver(message)`` is called when the last of them has arrived.

        Raises:
            InputError: the two are not connected.
        """
        if self._held and (src, dst) in self._held:
            self._held[src, dst].append((size, deliver, message))
            return
        path = self._paths.get((src, dst)) or self._open(src, dst)
        out_begin_s, out_end_s = path.nic_out.take(self._loop.now_s, size)
        link_begin_s, link_end_s = path.link.take(out_begin_s, size)
        arrival_s = (out_end_s if out_end_s > link_end_s else link_end_s) + path.latency_s
        if path.nic_in.rate is None:
            _, read_s = path.transport.take(arrival_s, size)
            self._loop.at(read_s, ARRIVAL, deliver, message)
        else:  # which message comes to the receiver's NIC first is known only when it comes
            reaching = (path, size, arrival_s, deliver, message)
            self._loop.at(link_begin_s + path.latency_s, WIRE, self._reach_nic, reaching)

    @property
    def held(self) -> Iterator[Any]:
        """Messages on links that are cut."""
        return (message for held in self._held.values() for _, _, message in held)

    def cut(self, src: str, dst: str) -> None:
        """What is sent from now on is held until the link heals; what was sent before still arrives."""
        self._held.setdefault((src, dst), [])

    def heal(self, src: str, dst: str) -> None:
        """Send what was held."""
        for size, deliver, message in self._held.pop((src, dst), []):
            self.send(src, dst, size, deliver, message)

    def scale(self, src: str, dst: str, factor: float) -> None:
        """The link carries ``factor`` times its bandwidth of the profile; what was sent before is not affected.

        Raises:
            InputError: the two are not connected.
        """
        bandwidth = self._links.bandwidth(src, dst)
        if bandwidth is None:
            raise InputError(f"{src} -> {dst}: the cluster has no such link, so its bandwidth cannot change")
        path = self._paths.get((src, dst)) or self._open(src, dst)
        path.link.rate = bandwidth * factor

    def _reach_nic(self, reaching: tuple[_Path, float, float, Deliver, Any]) -> None:
        path, size, arrival_s, deliver, message = reaching
        _, in_end_s = path.nic_in.take(self._loop.now_s, size)
        _, read_s = path.transport.take(arrival_s if arrival_s > in_end_s else in_end_s, size)
        self._loop.at(read_s, ARRIVAL, deliver, message)

    def _open(self, src: str, dst: str) -> _Path:
        bandwidth, latency_s = self._links.bandwidth(src, dst), self._links.latency_s(src, dst)
        if bandwidth is None or latency_s is None:
            raise InputError(f"{src} -> {dst}: the cluster has no such link, but the plan sends requests over it")
        byte_s = self._links.transport_byte_s(src, dst)
        transport = _Channel(1 / byte_s if byte_s else None)
        path = _Path(self._out[src], _Channel(bandwidth), self._in[dst], transport, latency_s)
        self._paths[src, dst] = path
        return path
