"""HTTP connections under bounds: how many there are, how long a request takes to arrive, how long a reader stalls.

uvicorn waits for ever for a request that was begun, and for a reader that takes nothing, and takes a client that has
closed its sending side for one that has gone.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import h11
import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from helixbench.errors import InputError
from helixbench.reference_server.http.openai.errors import ProtocolError
from helixbench.reference_server.http.options import HttpOptions

CLOSING_S = 2.0
"""After requests were cut off: for what they are told to arrive."""

_WATCH_S = 0.5  # between two looks at all connections
_PHRASES = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}
# A client has to understand this at any time. It makes the network say whether the client has gone altogether.
_PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"


class DrainingServer(uvicorn.Server):
    """A server that lets requests in flight end when it is told to stop, and cuts off those that take too long.

    Attributes:
        cut_off: called in its event loop when the time is over, with what clients are to be told.
    """

    def __init__(self, config: uvicorn.Config, drain_s: float) -> None:
        super().__init__(config)
        self._drain_s = drain_s
        self.cut_off: Callable[[str], None] = lambda _: None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop taking connections, and wait for those that are open."""
        message = f"the server is shutting down, and this request did not end within {self._drain_s:g} s"
        timer = asyncio.get_running_loop().call_later(self._drain_s, lambda: self.cut_off(message))
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def make_server(app: ASGIApp, options: HttpOptions) -> DrainingServer:
    """A server whose connections are guarded; it logs errors alone, for bad requests are the clients' affair."""
    guard = ConnectionGuard(options)
    config = uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], guard.connect),
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(options.drain_s + CLOSING_S),
        server_header=False,
    )
    return DrainingServer(config, options.drain_s)


def open_listener(host: str, port: int) -> socket.socket:
    """A listening TCP socket; IPv6 addresses may have brackets, and ``::`` takes IPv4 connections, too.

    Raises:
        InputError: the machine cannot listen there.
    """
    bare = host.removeprefix("[").removesuffix("]")
    is_ipv6 = ":" in bare
    if is_ipv6 and not socket.has_ipv6:
        raise InputError(f"--host {host}: this machine has no IPv6; give an IPv4 address")
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    is_dual = bare == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((bare, port), family=family, dualstack_ipv6=is_dual)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from error


def url_of(listener: socket.socket, host: str) -> str:
    """The server's base URL, with the host as it was given and brackets around an IPv6 address."""
    bare = host.removeprefix("[").removesuffix("]")
    port = listener.getsockname()[1]
    return f"http://[{bare}]:{port}" if ":" in bare else f"http://{bare}:{port}"


class ConnectionGuard:
    """All connections of a server, looked at a few times a second."""

    def __init__(self, options: HttpOptions) -> None:
        self.options = options
        self._open: dict[GuardedConnection, None] = {}
        self._idle: OrderedDict[GuardedConnection, None] = OrderedDict()  # no whole request; the longest so comes first
        self._leaving: set[GuardedConnection] = set()  # gave way to another, and have not ended yet
        self._watching: asyncio.TimerHandle | None = None

    def connect(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> asyncio.Protocol:
        """The protocol of a new connection; uvicorn calls this."""
        return GuardedConnection(self, config, server_state, app_state)

    def opened(self, connection: GuardedConnection) -> bool:
        """A connection was made; whether it may stay."""
        if len(self._open) - len(self._leaving) >= self.options.max_connections:
            longest = next(iter(self._idle), None)
            if longest is None:
                return False
            longest.give_up(503, "another connection needs the place of this one, which sent no whole request")
            del self._idle[longest]
            self._leaving.add(longest)
        self._open[connection] = None
        self._idle[connection] = None
        if self._watching is None:
            self._watch()
        return True

    def closed(self, connection: GuardedConnection) -> None:
        """A connection has ended."""
        self._open.pop(connection, None)
        self._idle.pop(connection, None)
        self._leaving.discard(connection)

    def note(self, connection: GuardedConnection, *, is_idle: bool) -> None:
        """Whether the connection has no whole request to answer."""
        if not is_idle:
            self._idle.pop(connection, None)
        elif connection in self._open and connection not in self._leaving:
            self._idle.setdefault(connection, None)

    def _watch(self) -> None:
        now_s = time.monotonic()
        for connection in list(self._open):
            connection.look(now_s)
        loop = asyncio.get_running_loop()
        self._watching = loop.call_later(_WATCH_S, self._watch) if self._open else None


class GuardedConnection(H11Protocol):
    """uvicorn's connection that ends itself when its client does not do its part."""

    def __init__(
        self, guard: ConnectionGuard, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any]
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._guard = guard
        self._is_refused = False
        self._is_half_closed = False
        self._idle_since_s: float | None = time.monotonic()  # no whole request since; None while one is answered
        self._unread = (0, self._idle_since_s)  # bytes that the client does not take, and since when

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, or say that there are too many."""
        super().connection_made(transport)
        if not self._guard.opened(self):
            self._is_refused = True
            self.give_up(503, f"this server has {self._guard.options.max_connections} connections, all of them busy")

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended."""
        super().connection_lost(exc)
        self._guard.closed(self)

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request."""
        if self._is_refused:
            return
        super().data_received(data)
        self._note()

    def on_response_complete(self) -> None:
        """The answer is out, and the next request may begin."""
        super().on_response_complete()
        self._note()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more: where it has sent a whole request, it gets its answer. True keeps it open."""
        if self._idle_since_s is not None or self._is_refused:
            return False
        self._is_half_closed = True
        self.cycle.keep_alive = False
        if not self.cycle.response_started and self.scope["http_version"] != "1.0":
            self.transport.write(_PROBE)
        return True

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP; uvicorn calls this."""
        self.give_up(400, msg)

    def look(self, now_s: float) -> None:
        """End it where the client has kept it waiting for too long, or has gone."""
        options = self._guard.options
        num_unread = self.transport.get_write_buffer_size()
        if num_unread == 0 or num_unread != self._unread[0]:
            self._unread = (num_unread, now_s)
        if now_s - self._unread[1] > options.stall_timeout_s or (self._is_half_closed and self._is_reset()):
            self.transport.abort()
        elif self._idle_since_s is not None and now_s - self._idle_since_s > options.request_timeout_s:
            self.give_up(408, f"no whole request within {options.request_timeout_s:g} s")

    def give_up(self, status: int, message: str) -> None:
        """Say why, where no answer has begun, and close."""
        has_begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        is_asking = self._is_refused or bool(self.conn.trailing_data[0]) or self.conn.their_state is not h11.IDLE
        if is_asking and not has_begun and not self.transport.is_closing():
            self.transport.write(_raw_answer(ProtocolError(status, message)))
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._idle_since_s = None
        self.transport.close()

    def _note(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete
        if is_answering:
            self._idle_since_s = None
        elif self._idle_since_s is None:
            self._idle_since_s = time.monotonic()
        self._guard.note(self, is_idle=not is_answering)

    def _is_reset(self) -> bool:
        """Whether the network said, in answer to what was sent, that there is nobody."""
        opened: socket.socket = self.transport.get_extra_info("socket")
        return opened.fileno() >= 0 and opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def _raw_answer(error: ProtocolError) -> bytes:
    body = msgspec.json.encode(error.body())
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = [f"HTTP/1.1 {error.status} {_PHRASES[error.status]}"]
    lines += [f"{name}: {value}" for name, value in (headers | error.headers).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
