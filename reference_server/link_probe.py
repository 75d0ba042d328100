"""Both ends of a link's measurement, over iperf3 for bandwidth and over the server's own transport for latency."""

from __future__ import annotations

import contextlib
import socket
import statistics
import time

import zmq

from profiler.errors import MeasurementError
from profiler.network import Iperf3MissingError, Iperf3Server, iperf3_source, measure_bandwidth

from .messages import Echo, Echoed, IperfServing, LinkMeasured, MeasureLink, decode_answer
from .transport import Transport, send

NUM_ROUND_TRIPS = 30
_FRAME_BYTES = 1 << 20  # of the transport's own bandwidth measurement
_ANSWER_S = 30.0


class IperfEnd:
    """The iperf3 server of one agent: at most one at a time, each for one test."""

    def __init__(self) -> None:
        self._server: Iperf3Server | None = None

    def serve(self) -> IperfServing:
        """Listen for one test on a free port; ``port`` is ``None`` where iperf3 is not installed."""
        self.close()
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        try:
            self._server = Iperf3Server(port)
        except Iperf3MissingError:
            return IperfServing(None)
        return IperfServing(port)

    def close(self) -> None:
        """Stop the server, if there is one."""
        if self._server is not None:
            self._server.close()
            self._server = None


def measure_link(transport: Transport, command: MeasureLink) -> LinkMeasured:
    """Measure to the agent at ``command.address``, or from it where ``command.reverse``.

    Raises:
        MeasurementError: the peer does not answer, or iperf3 fails.
    """
    host = command.address.rpartition(":")[0]
    with contextlib.closing(_Probe(transport, command.address)) as probe:
        round_trip_s = probe.round_trip_s()
        try:
            if command.iperf_port is None:
                raise Iperf3MissingError("the other end has no iperf3")
            bandwidth = measure_bandwidth(host, command.iperf_port, seconds=command.seconds, reverse=command.reverse)
            source = iperf3_source()
        except Iperf3MissingError:
            bandwidth = probe.bytes_per_s(command.seconds, round_trip_s, reverse=command.reverse)
            source = "helixbench transport (iperf3 missing)"
    return LinkMeasured(bandwidth, round_trip_s / 2, source)


class _Probe:
    """A connection of its own to a peer agent, for echoes."""

    def __init__(self, transport: Transport, address: str) -> None:
        self._address = address
        self._socket = transport.connect(address)
        self._number = 0
        self._echo()  # the handshake is not part of a round trip

    def close(self) -> None:
        self._socket.close()

    def round_trip_s(self) -> float:
        """Median over ``NUM_ROUND_TRIPS`` echoes without a tensor."""
        return statistics.median(self._echo() for _ in range(NUM_ROUND_TRIPS))

    def bytes_per_s(self, seconds: float, round_trip_s: float, *, reverse: bool) -> float:
        """Frames of 1 MiB one way, each answered with a few bytes; the round trip is taken off.

        At most half of the time is taken off: on a busy machine a round trip may take as long as a frame.
        """
        frame = bytes(_FRAME_BYTES)
        times: list[float] = []
        while sum(times) < seconds or len(times) < 3:
            times.append(self._echo(reply_bytes=_FRAME_BYTES) if reverse else self._echo(payload=frame))
        median_s = statistics.median(times)
        return _FRAME_BYTES / max(median_s - round_trip_s, median_s / 2)

    def _echo(self, payload: bytes | None = None, reply_bytes: int = 0) -> float:
        self._number += 1
        begin = time.perf_counter()
        send(self._socket, Echo(self._number, reply_bytes), payload)
        if not self._socket.poll(int(_ANSWER_S * 1000), zmq.POLLIN):
            raise MeasurementError(f"the agent at {self._address} did not echo within {_ANSWER_S:.0f} s")
        header = self._socket.recv_multipart()[0]
        elapsed = time.perf_counter() - begin
        answer = decode_answer(header)
        if not isinstance(answer, Echoed) or answer.number != self._number:
            raise MeasurementError(f"the agent at {self._address} answered an echo with {type(answer).__name__}")
        return elapsed
