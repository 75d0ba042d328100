"""ZeroMQ sockets between coordinator and agents: CURVE on every one, only holders of the cluster key are let in.

An agent listens on one ROUTER; whoever has something for it connects a DEALER. Answers go back over the connection that
the question came on, so only agents need an address.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import zmq
from zmq.auth.thread import ThreadAuthenticator

from helixbench.errors import InputError
from helixbench.reference_server.wire.address import require_address, require_listen
from helixbench.reference_server.wire.keys import ClusterKey
from helixbench.reference_server.wire.messages import MAX_FRAME_BYTES, Answer, Command, encode

_HEARTBEAT_MS = 2_000
_HEARTBEAT_TIMEOUT_MS = 15_000


class Transport:
    """The ZeroMQ context of one process, with the gate that lets in only holders of the cluster key."""

    def __init__(self, key: ClusterKey) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._key = key
        self._gate: ThreadAuthenticator | None = None

    def listen(self, address: str) -> tuple[zmq.Socket[bytes], str]:
        """A ROUTER bound to ``host:port`` (port 0: any), and the address that it got.

        Raises:
            InputError: not an address, or it cannot be bound.
        """
        require_listen(address)
        if self._gate is None:
            self._gate = ThreadAuthenticator(self.context)
            self._gate.start()
            self._gate.configure_curve_callback(domain="*", credentials_provider=_ClusterGate(self._key))
        router = self._socket(zmq.ROUTER)
        router.curve_server = True
        router.curve_publickey, router.curve_secretkey = self._key.public.encode(), self._key.secret.encode()
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            router.bind(f"tcp://{address}")
        except zmq.ZMQError as error:
            router.close()
            raise InputError(
                f"--listen {address}: cannot be bound ({error}); need a free HOST:PORT of this machine"
            ) from error
        return router, router.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")

    def connect(self, address: str) -> zmq.Socket[bytes]:
        """A DEALER to the agent at ``host:port``. Connecting goes on in the background and is retried.

        Raises:
            InputError: not an address.
        """
        dealer = self._socket(zmq.DEALER)
        dealer.curve_serverkey = self._key.public.encode()
        dealer.curve_publickey, dealer.curve_secretkey = self._key.public.encode(), self._key.secret.encode()
        try:
            dealer.connect(f"tcp://{require_address(address)}")
        except (zmq.ZMQError, ValueError) as error:
            dealer.close()
            raise InputError(f"{address}: not an address of the form HOST:PORT ({error})") from error
        return dealer

    def close(self) -> None:
        """Close all sockets; what is still queued is dropped."""
        if self._gate is not None:
            self._gate.stop()
        self.context.destroy(linger=0)

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        # Work in flight is bounded by the KV caches; a high-water mark below that would block the loop or drop work.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
        return socket


class _ClusterGate:
    def __init__(self, key: ClusterKey) -> None:
        self._public = key.public.encode()

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002 - the authenticator passes it
        """True for the cluster's own key, given as Z85."""
        return hmac.compare_digest(key, self._public)


def send(socket: zmq.Socket[bytes], message: Command | Answer, payload: memoryview | bytes | None = None) -> int:
    """Send to the other end of a DEALER; returns the bytes sent."""
    return send_frames(socket, [encode(message)], payload)


def reply(
    router: zmq.Socket[bytes], identity: bytes, message: Answer, payload: memoryview | bytes | None = None
) -> int:
    """Send to one of a ROUTER's peers; returns the bytes sent, its identity not counted.

    Raises:
        zmq.ZMQError: the peer has gone (``EHOSTUNREACH``).
    """
    return send_frames(router, [identity, encode(message)], payload) - len(identity)


def send_frames(socket: zmq.Socket[bytes], frames: Sequence[bytes], payload: memoryview | bytes | None) -> int:
    """Send frames as one message; returns the bytes sent."""
    parts: list[bytes | memoryview] = [*frames] if payload is None else [*frames, payload]
    socket.send_multipart(parts)
    return sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts)
