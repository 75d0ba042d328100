"""ZeroMQ sockets between coordinator and agents, all CURVE: connections without the cluster key are rejected.

An agent listens on one ROUTER; peers connect a DEALER each. Answers return over the connection of the question, so only
agents need an address.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import zmq
from zmq.auth.thread import ThreadAuthenticator

from helixbench.errors import InputError
from helixbench.reference_server.wire.keys import ClusterKey
from helixbench.reference_server.wire.messages import MAX_FRAME_BYTES, Answer, Command, encode

_HEARTBEAT_MS = 2_000
_HEARTBEAT_TIMEOUT_MS = 15_000
_LAST_PORT = 2**16 - 1


def require_address(text: str, *, first_port: int = 1) -> str:
    """The address if it has the form HOST:PORT with a port from ``first_port`` (0: any free one) on.

    Checked here because ZeroMQ silently takes a port beyond 65535 modulo 65536.

    Raises:
        ValueError: what is needed instead.
    """
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise ValueError("need HOST:PORT, like 10.0.0.7:9000 or [::1]:9000")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError("an IPv6 address needs brackets, like [::1]:9000")
    if not first_port <= int(port) <= _LAST_PORT:
        raise ValueError(f"need HOST:PORT with a port of {first_port} to {_LAST_PORT}")
    return text


def require_listen(text: str) -> None:
    """Check the value of ``--listen``; whether the port is free shows when it is bound.

    Raises:
        InputError: not an address.
    """
    try:
        require_address(text, first_port=0)
    except ValueError as error:
        raise InputError(f"--listen {text}: {error}") from error


def require_peer(address: str) -> None:
    """Check the address of another agent.

    Raises:
        InputError: not an address.
    """
    try:
        require_address(address)
    except ValueError as error:
        raise InputError(f"{address}: not an address of the form HOST:PORT ({error})") from error


def host_of(address: str) -> str:
    """Host of a HOST:PORT address, an IPv6 one without its brackets."""
    return address.rpartition(":")[0].strip("[]")


def own_address(address: str) -> str:
    """Address at which a process reaches itself, given the one that it listens at."""
    host, _, port = address.rpartition(":")
    anywhere = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "[::]": "[::1]"}
    return f"{anywhere.get(host, host)}:{port}"


class Transport:
    """The ZeroMQ context of one process; its listening sockets reject connections without the cluster key."""

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
        router = self._socket(zmq.ROUTER, address)
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
        """A DEALER to the agent at ``host:port``; the connection is made, and retried, in the background.

        Raises:
            InputError: not an address.
        """
        require_peer(address)
        dealer = self._socket(zmq.DEALER, address)
        dealer.curve_serverkey = self._key.public.encode()
        dealer.curve_publickey, dealer.curve_secretkey = self._key.public.encode(), self._key.secret.encode()
        try:
            dealer.connect(f"tcp://{address}")
        except zmq.ZMQError as error:
            dealer.close()
            raise InputError(f"{address}: not an address of the form HOST:PORT ({error})") from error
        return dealer

    def close(self, *, linger_s: float = 0.0) -> None:
        """Close all sockets; what has not left after that time is dropped."""
        if self._gate is not None:
            self._gate.stop()
        self.context.destroy(linger=round(1000 * linger_s))

    def _socket(self, kind: int, address: str) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        socket.setsockopt(zmq.IPV6, int(address.startswith("[")))  # with it, names and IPv4 addresses come out mapped
        socket.setsockopt(zmq.LINGER, 0)
        # Work in flight is bounded by the KV caches; a lower high-water mark would block the loop or drop work.
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
        """Whether the client's key, in Z85, is the cluster's."""
        return hmac.compare_digest(key, self._public)


def send(socket: zmq.Socket[bytes], message: Command | Answer, payload: memoryview | bytes | None = None) -> int:
    """Send over a DEALER; returns the bytes sent."""
    return send_frames(socket, [encode(message)], payload)


def reply(
    router: zmq.Socket[bytes], identity: bytes, message: Answer, payload: memoryview | bytes | None = None
) -> int:
    """Send to one of a ROUTER's peers; returns the bytes sent, without its identity.

    Raises:
        zmq.ZMQError: the peer is gone (``EHOSTUNREACH``).
    """
    return send_frames(router, [identity, encode(message)], payload) - len(identity)


def send_frames(socket: zmq.Socket[bytes], frames: Sequence[bytes], payload: memoryview | bytes | None) -> int:
    """Send frames as one message; returns the bytes sent."""
    parts: list[bytes | memoryview] = [*frames] if payload is None else [*frames, payload]
    socket.send_multipart(parts)
    return sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts)
