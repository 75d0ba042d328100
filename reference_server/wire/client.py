"""The coordinator's end of the wire: one connection per agent, commands and their answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from helixbench.errors import HelixbenchError, InputError, MeasurementError
from helixbench.reference_server.wire.held import HeldMessages
from helixbench.reference_server.wire.keys import ClusterKey
from helixbench.reference_server.wire.messages import (
    Answer,
    Command,
    Describe,
    Description,
    Failed,
    Progress,
    Sampled,
    Status,
    decode_answer,
)
from helixbench.reference_server.wire.transport import Transport, send

_CONNECT_S = 15.0  # an agent may load NVML to describe itself, on a fraction of a core
_LINGER_S = 0.5
AnswerT = TypeVar("AnswerT")


class AgentFailedError(HelixbenchError):
    """An agent could not do what it was asked; carries the exit code that the agent gave."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Disconnected(msgspec.Struct, frozen=True):
    """The connection to an agent was closed from the other side, or could not be made; it is tried again and again."""


class Unreadable(msgspec.Struct, frozen=True):
    """An agent sent what is no answer; ``message`` says why."""

    message: str


class Agents:
    """Connections to the agents of a cluster.

    Args:
        addresses: node -> host:port.
        key: the cluster's.
    """

    def __init__(self, addresses: Mapping[str, str], key: ClusterKey) -> None:
        self._transport = Transport(key)
        self.addresses: dict[str, str] = {}
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._poller = zmq.Poller()
        self._node_of: dict[zmq.Socket[bytes], str] = {}  # data socket -> node
        self._monitored: dict[zmq.Socket[bytes], str] = {}  # monitor socket -> node
        self._held: HeldMessages[tuple[str, Answer]] = HeldMessages()
        for node, address in addresses.items():
            self.connect(node, address)

    def __enter__(self) -> Agents:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self, node: str, address: str) -> None:
        """Connect to one more agent.

        Raises:
            InputError: not an address.
        """
        socket = self._transport.connect(address)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.addresses[node] = address
        self._sockets[node] = socket
        self._node_of[socket] = node
        self._monitored[monitor] = node
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)

    def close(self) -> None:
        """Close all connections; what was sent last has a moment to leave."""
        for socket in self._sockets.values():
            socket.disable_monitor()
        self._transport.close(linger_s=_LINGER_S)

    def send(self, node: str, message: Command, payload: bytes | memoryview | None = None) -> int:
        """Send to a node's agent; returns the bytes sent."""
        return send(self._sockets[node], message, payload)

    def watch(self, socket: zmq.Socket[bytes] | int) -> None:
        """Make ``receive`` return early when this socket or file descriptor becomes readable."""
        self._poller.register(socket, zmq.POLLIN)

    def receive(self, timeout_ms: int) -> Iterator[tuple[str, Answer | Disconnected | Unreadable]]:
        """What agents answered, and what became of their connections, waiting at most ``timeout_ms`` for the first."""
        for ready, _ in self._poller.poll(self._held.poll_ms(timeout_ms)):
            if ready in self._monitored:
                recv_monitor_message(ready)
                yield self._monitored[ready], Disconnected()
            elif ready in self._node_of:
                yield from self._drain(ready)
        yield from self._held.take()

    def _drain(self, socket: zmq.Socket[bytes]) -> Iterator[tuple[str, Answer | Unreadable]]:
        node = self._node_of[socket]
        while True:
            try:
                header, *_ = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                answer = decode_answer(header)
            except MeasurementError as error:
                yield node, Unreadable(str(error))
                continue
            if isinstance(answer, Sampled) and answer.due_s:
                self._held.add((node, answer), due_s=answer.due_s)
            else:
                yield node, answer

    def ask(
        self,
        commands: Mapping[str, Command],
        expected: type[AnswerT],
        *,
        timeout_s: float,
        on_progress: Callable[[str, Progress], None] = lambda _node, _progress: None,
    ) -> dict[str, AnswerT]:
        """Ask several nodes at once and wait for all: node -> answer. Each report of progress extends the deadline.

        Raises:
            MeasurementError: a node answers with another type, or not in time, or its connection broke.
            AgentFailedError: a node could not do it.
        """
        for node, command in commands.items():
            self.send(node, command)
        answers: dict[str, AnswerT] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < len(commands):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                missing = ", ".join(f"{n} ({self.addresses[n]})" for n in commands if n not in answers)
                raise MeasurementError(f"no answer within {timeout_s:.0f} s from {missing}; see the agents' logs")
            for node, answer in self.receive(int(left_s * 1000) + 1):
                if isinstance(answer, Progress):
                    deadline = time.monotonic() + timeout_s
                    on_progress(node, answer)
                elif isinstance(answer, expected):
                    answers[node] = answer
                elif isinstance(answer, Disconnected):
                    where = self.addresses[node]
                    raise MeasurementError(f"node {node}: the agent at {where} closed the connection; see its log")
                elif isinstance(answer, Unreadable):
                    raise MeasurementError(f"node {node}: {answer.message}")
                elif isinstance(answer, Failed):
                    raise AgentFailedError(f"node {node}: {answer.message}", answer.exit_code)
                elif isinstance(answer, Status):
                    continue  # of a stage that loaded sooner than others
                else:
                    raise MeasurementError(f"node {node}: answered {type(answer).__name__}, not {expected.__name__}")
        return answers

    def ask_one(self, node: str, command: Command, expected: type[AnswerT], *, timeout_s: float) -> AnswerT:
        """Ask one node; see ``ask``."""
        return self.ask({node: command}, expected, timeout_s=timeout_s)[node]

    def describe(self) -> dict[str, Description]:
        """Ask every agent to describe itself: node -> description.

        Raises:
            InputError: one does not answer: nothing listens there, or it holds another cluster's key.
        """
        try:
            return self.ask({node: Describe() for node in self._sockets}, Description, timeout_s=_CONNECT_S)
        except MeasurementError as error:
            raise InputError(f"{error} Is each agent started, reachable, and holding the same key?") from error
