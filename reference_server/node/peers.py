"""Peers: an agent's connections to the nodes that it sends work to, and how it sees them."""

from __future__ import annotations

import collections
from collections.abc import Mapping

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from helixbench.errors import MeasurementError
from helixbench.reference_server.wire.messages import PeerPing, Work
from helixbench.reference_server.wire.transport import Transport, require_peer, send
from helixbench.solver.scheduling.watch import REPORT_EVERY_S, PeerSeen

SLOWEST_SHARE = 1 / 3
"""Of its measured rate that a link keeps, at the least, while others share it."""


class Silence:
    """How long a peer has been silent, beyond the time for which what was sent before keeps its answers waiting.

    Questions stand in line behind work on a connection: on a slow link behind seconds of it.

    Args:
        bytes_per_s: that the link carries; ``None`` where that is not known, and work takes no time.
        now_s: the time.
    """

    def __init__(self, bytes_per_s: float | None, *, now_s: float) -> None:
        self._byte_s = 1 / (SLOWEST_SHARE * bytes_per_s) if bytes_per_s else 0.0
        self._answered_s = now_s
        self._sent_bytes = self._arrived_bytes = 0
        self._asked: collections.deque[tuple[float, int]] = collections.deque()  # when, and the bytes sent before

    def sent(self, size: int) -> None:
        """So many bytes of work were sent."""
        self._sent_bytes += size

    def asked(self, now_s: float) -> None:
        """The peer was asked whether it is there; it answers in order."""
        self._asked.append((now_s, self._sent_bytes))

    def answered(self, now_s: float) -> None:
        """An answer came: what was sent before its question has arrived."""
        if self._asked:
            self._arrived_bytes = self._asked.popleft()[1]
        self._answered_s = now_s

    def seconds(self, now_s: float) -> float:
        """Seconds by which its next answer is overdue; 0 while it is not."""
        if not self._asked:
            return 0.0
        asked_s, sent_bytes = self._asked[0]
        due_s = max(self._answered_s, asked_s) + (sent_bytes - self._arrived_bytes) * self._byte_s
        return max(0.0, now_s - due_s)


class _Peer(msgspec.Struct):
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    silence: Silence
    is_connected: bool = True  # until the connection is known to be closed: it is made in the background


class Peers:
    """Connections that are made when something is first sent, and answer when asked.

    Args:
        transport: of the agent.
        addresses: peer -> host:port.
        bytes_per_s: peer -> what the link there carries, where that is known.
        now_s: the time.

    Raises:
        InputError: an address has another form.
    """

    def __init__(
        self, transport: Transport, addresses: Mapping[str, str], bytes_per_s: Mapping[str, float], *, now_s: float
    ) -> None:
        self._transport = transport
        for address in addresses.values():
            require_peer(address)
        self._addresses, self._bytes_per_s = dict(addresses), dict(bytes_per_s)
        self._peers: dict[str, _Peer] = {}
        self._pinged_s = now_s

    def send(self, peer: str, work: Work, payload: memoryview | None, *, now_s: float) -> int:
        """Hand work to the peer; returns the bytes sent.

        Raises:
            MeasurementError: a node that was not among the peers when the stage was loaded.
        """
        if peer not in self._peers:
            if peer not in self._addresses:
                raise MeasurementError(f"a pipeline goes on to node {peer}, whose address was not given")
            socket = self._transport.connect(self._addresses[peer])
            monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
            self._peers[peer] = _Peer(socket, monitor, Silence(self._bytes_per_s.get(peer), now_s=now_s))
        size = send(self._peers[peer].socket, work, payload)
        self._peers[peer].silence.sent(size)
        return size

    def tick(self, now_s: float) -> None:
        """Take in what peers answered, and ask them again now and then."""
        is_due = now_s - self._pinged_s >= REPORT_EVERY_S
        if is_due:
            self._pinged_s = now_s
        for peer in self._peers.values():
            while peer.monitor.poll(0):
                peer.is_connected = recv_monitor_message(peer.monitor)["event"] != zmq.EVENT_DISCONNECTED
            while peer.socket.poll(0):
                peer.socket.recv_multipart()  # nothing but answers comes back over it
                peer.silence.answered(now_s)
            if is_due:
                send(peer.socket, PeerPing())
                peer.silence.asked(now_s)

    def seen(self, now_s: float) -> tuple[PeerSeen, ...]:
        """Each peer that anything was sent to."""
        return tuple(
            PeerSeen(name, peer.is_connected, peer.silence.seconds(now_s)) for name, peer in self._peers.items()
        )

    def close(self) -> None:
        """Close all connections."""
        for peer in self._peers.values():
            peer.socket.disable_monitor()
            peer.monitor.close()
            peer.socket.close()
        self._peers = {}
