"""Both ends of a link's measurement, over iperf3 for bandwidth and over the server's own transport for latency."""

from __future__ import annotations

import contextlib
import math
import socket
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import zmq

from helixbench.errors import MeasurementError
from helixbench.profiler.cluster import MessageTime
from helixbench.profiler.network.iperf3 import (
    DEFAULT_BLOCK_BYTES,
    INTERVAL_S,
    MIN_BLOCKS,
    Iperf3MissingError,
    Iperf3Server,
    TcpRate,
    iperf3_source,
    measure_bandwidth,
)
from helixbench.profiler.network.message_times import bytes_per_s
from helixbench.reference_server.wire.link_messages import (
    Flow,
    FlowsMeasured,
    IperfServing,
    LinkMeasured,
    MeasureFlows,
    MeasureLink,
)
from helixbench.reference_server.wire.messages import Echo, Echoed, decode_answer
from helixbench.reference_server.wire.transport import Transport, send

NUM_ROUND_TRIPS = 30
TRANSPORT_SOURCE = "helixbench transport (iperf3 missing)"
_FRAME_BYTES = 1 << 20  # of the transport's own bandwidth measurement
_ANSWER_S = 30.0
_MIN_MESSAGES = 3
_MESSAGES_S = 0.05  # for each size, where so many take longer than the fewest do
_MIN_BLOCK_BYTES = 4096
_MORE_PORTS = 2  # tried in all, where an iperf3 server does not come to listen


class IperfEnd:
    """The iperf3 servers of one agent, each for one test."""

    def __init__(self) -> None:
        self._servers: list[Iperf3Server] = []

    def serve(self, count: int = 1) -> IperfServing:
        """Listen for ``count`` tests on free ports; none where iperf3 is not installed, or fails on several of them."""
        self.close()
        ports, spare = _free_ports(count), _MORE_PORTS
        while ports:
            try:
                self._servers.append(Iperf3Server(ports.pop()))
            except Iperf3MissingError:
                return IperfServing(())
            except MeasurementError as error:
                if not spare:
                    self.close()
                    return IperfServing((), str(error))
                spare -= 1
                ports += _free_ports(1)  # somebody else may have taken that one since it was found free
        return IperfServing(tuple(server.port for server in self._servers))

    def close(self) -> None:
        """Stop the servers, if there are any."""
        for server in self._servers:
            server.close()
        self._servers = []


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def measure_link(transport: Transport, command: MeasureLink) -> LinkMeasured:
    """Measure to the agent at ``command.address``, or from it where ``command.reverse``.

    What cannot be measured is said in the answer's ``error``: it is the link's, and the others go on.
    """
    latency_s: float | None = None
    times: tuple[MessageTime, ...] = ()
    try:
        with contextlib.closing(_Probe(transport, command.address)) as probe:
            round_trip_s = probe.round_trip_s()
            latency_s = round_trip_s / 2
            times = probe.message_times(command, latency_s)
            rough = command.rough_bytes_per_s or bytes_per_s(times)
            rate, source = _bandwidth(probe, command, round_trip_s, rough_bytes_per_s=rough)
    except MeasurementError as error:
        return LinkMeasured(bandwidth_bytes_per_s=None, latency_s=latency_s, message_times=times, error=str(error))
    return LinkMeasured(
        bandwidth_bytes_per_s=rate.bytes_per_s,
        latency_s=latency_s,
        source=source,
        spread=rate.spread,
        retransmitted=rate.retransmitted,
        message_times=times,
    )


def measure_flows(command: MeasureFlows) -> FlowsMeasured:
    """Several iperf3 tests at the same time; what fails is said in the answer's ``error``."""
    if not command.flows:
        return FlowsMeasured(())
    try:
        with ThreadPoolExecutor(len(command.flows)) as pool:
            rates = list(pool.map(lambda flow: _flow_bytes_per_s(flow, command.seconds), command.flows))
    except MeasurementError as error:
        return FlowsMeasured((), str(error))
    return FlowsMeasured(tuple(rates))


def _flow_bytes_per_s(flow: Flow, seconds: float) -> float:
    rate = measure_bandwidth(
        flow.host,
        flow.port,
        seconds=seconds,
        reverse=flow.reverse,
        omit_s=0,  # the middle is taken
        block_bytes=_block_bytes(flow.rough_bytes_per_s),
    )
    return rate.bytes_per_s if rate.middle_bytes_per_s is None else rate.middle_bytes_per_s


def _bandwidth(
    probe: _Probe, command: MeasureLink, round_trip_s: float, *, rough_bytes_per_s: float | None
) -> tuple[TcpRate, str]:
    """The rate, and what measured it."""
    host = command.address.rpartition(":")[0]
    try:
        if command.iperf_problem:
            raise MeasurementError(command.iperf_problem)
        if command.iperf_port is None:
            raise Iperf3MissingError("the other end has no iperf3")
        rate = measure_bandwidth(
            host,
            command.iperf_port,
            seconds=command.seconds,
            reverse=command.reverse,
            block_bytes=_block_bytes(rough_bytes_per_s),
        )
        return rate, iperf3_source()
    except Iperf3MissingError:
        return TcpRate(probe.bytes_per_s(command.seconds, round_trip_s, reverse=command.reverse)), TRANSPORT_SOURCE


def _block_bytes(rough_bytes_per_s: float | None) -> int | None:
    """Blocks of which an interval holds enough on a slow link, where the last one's part would be a large part."""
    if rough_bytes_per_s is None:
        return None
    fits = rough_bytes_per_s * INTERVAL_S / (2 * MIN_BLOCKS)
    return max(_MIN_BLOCK_BYTES, min(DEFAULT_BLOCK_BYTES, 1 << int(math.log2(max(fits, 1.0)))))


class _Probe:
    """A connection of its own to a peer agent, for echoes."""

    def __init__(self, transport: Transport, address: str) -> None:
        self._address = address
        self._socket = transport.connect(address)
        self._number = 0
        try:
            self._echo()  # the handshake is not part of a round trip
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def round_trip_s(self) -> float:
        """Median over ``NUM_ROUND_TRIPS`` echoes without a tensor."""
        return statistics.median(self._echo() for _ in range(NUM_ROUND_TRIPS))

    def message_times(self, command: MeasureLink, latency_s: float) -> tuple[MessageTime, ...]:
        """One-way time over the message's size, smallest first, until the next would take too long.

        A message goes one way and an empty one the other, whose time is taken off: the latency.
        """
        times: list[MessageTime] = []
        for size in sorted(command.message_bytes):
            if times and times[-1].one_way_s * size / times[-1].message_bytes > command.message_limit_s:
                break  # in proportion, which overstates where latency is a part of it
            median_s = self._median_echo_s(size, reverse=command.reverse)
            times.append(MessageTime(size, max(median_s - latency_s, median_s / 2)))
        return tuple(times)

    def _median_echo_s(self, size: int, *, reverse: bool) -> float:
        payload = None if reverse else bytes(size)
        taken: list[float] = []
        while len(taken) < _MIN_MESSAGES or sum(taken) < _MESSAGES_S:
            taken.append(self._echo(payload, reply_bytes=size if reverse else 0))
        return statistics.median(taken)

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
