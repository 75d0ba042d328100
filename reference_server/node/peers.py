"""Peers: an agent's connections to the nodes that it sends work to, and how it sees them."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from helixbench.errors import MeasurementError
from helixbench.reference_server.wire.messages import PeerPing, Work
from helixbench.reference_server.wire.transport import Transport, require_peer, send
from helixbench.solver.scheduling.watch import REPORT_EVERY_S, PeerSeen


class _Peer(msgspec.Struct):
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    answered_s: float
    is_connected: bool = True  # until the connection is known to be closed: it is made in the background


class Peers:
    """Connections that are made when something is first sent, and answer when asked.

    Args:
        transport: of the agent.
        addresses: peer -> host:port.
        now_s: the time.

    Raises:
        InputError: an address has another form.
    """

    def __init__(self, transport: Transport, addresses: Mapping[str, str], *, now_s: float) -> None:
        self._transport = transport
        for address in addresses.values():
            require_peer(address)
        self._addresses = dict(addresses)
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
            self._peers[peer] = _Peer(socket, monitor, answered_s=now_s)
        return send(self._peers[peer].socket, work, payload)

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
                peer.answered_s = now_s
            if is_due:
                send(peer.socket, PeerPing())

    def seen(self, now_s: float) -> tuple[PeerSeen, ...]:
        """Each peer that anything was sent to."""
        return tuple(PeerSeen(name, peer.is_connected, now_s - peer.answered_s) for name, peer in self._peers.items())

    def close(self) -> None:
        """Close all connections."""
        for peer in self._peers.values():
            peer.socket.disable_monitor()
            peer.monitor.close()
            peer.socket.close()
        self._peers = {}
