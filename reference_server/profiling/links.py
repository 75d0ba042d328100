"""Both ends of a link measurement: bandwidth by iperf3, latency and message times over the server's own transport."""

from __future__ import annotations

import contextlib
import math
import socket
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import zmq

from helixbench.errors import MeasurementError
from helixbench.profiler.cluster import MessageTime
from helixbench.profiler.network.iperf3 import (
    DEFAULT_BLOCK_BYTES,
    INTERVAL_S,
    Iperf3MissingError,
    Iperf3Server,
    iperf3_source,
    measure_bandwidth,
)
from helixbench.profiler.network.links import rough_bytes_per_s
from helixbench.reference_server.wire.messages import (
    Echo,
    Echoed,
    Flow,
    FlowsMeasured,
    IperfServing,
    LinkMeasured,
    MeasureFlows,
    MeasureLink,
    decode_answer,
)
from helixbench.reference_server.wire.transport import Transport, host_of, send

NUM_ROUND_TRIPS = 30
_FRAME_BYTES, _MIN_FRAME_BYTES, _FRAMES = 1 << 20, 1 << 14, 3  # of the transport's own bandwidth measurement
_ANSWER_S = 30.0
_MIN_MESSAGES = 3
_MESSAGES_S = 0.05  # spent on each message size, where the fewest messages take less
_BLOCKS = 32  # in an iperf3 interval
_MIN_BLOCK_BYTES = 4096
_ALIKE = 0.5  # of the fastest rate
_FASTEST_LINKS, _TRANSPORT_S = 3, 0.2  # over how many the transport's time per byte is measured, for how long each
_SPARE_PORTS = 2  # tried where an iperf3 server does not come to listen


class IperfServers:
    """The iperf3 servers of one agent, each for one test."""

    def __init__(self) -> None:
        self._servers: list[Iperf3Server] = []

    def serve(self, count: int) -> IperfServing:
        """Listen for ``count`` tests on free ports; earlier servers are stopped."""
        self.close()
        ports, spare = _free_ports(count), _SPARE_PORTS
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
                ports += _free_ports(1)  # another process may have taken that one since it was found free
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

    A failure is the link's: it goes into the answer's ``error``, and other links are measured all the same.
    """
    latency_s: float | None = None
    times: tuple[MessageTime, ...] = ()
    try:
        with contextlib.closing(_Probe(transport, command.address)) as probe:
            round_trip_s = probe.round_trip_s()
            latency_s = round_trip_s / 2
            times = probe.message_times(command, latency_s)
            rough = command.rough_bytes_per_s or rough_bytes_per_s(times)
            rate, iperf3 = _bandwidth(probe, command, round_trip_s, rough)
    except MeasurementError as error:
        return LinkMeasured(None, latency_s, message_times=times, error=str(error))
    return LinkMeasured(rate, latency_s, message_times=times, iperf3=iperf3)


class TransportTime(NamedTuple):
    """What the server's own transport takes beyond the link: seconds per message, and per byte of it."""

    message_s: float
    byte_s: float


def measure_transport(transport: Transport, bytes_per_s: Mapping[str, float]) -> TransportTime:
    """Measure to agents over links whose rates are known: address -> bytes/s.

    Per message it is the median over all agents of half a round trip. Per byte it is the median over the fastest links
    that are about alike, for over others the rate's own error would be larger than what is left.

    Raises:
        MeasurementError: an agent does not answer.
    """
    top = max(bytes_per_s.values())
    alike = [address for address, rate in bytes_per_s.items() if rate >= _ALIKE * top][:_FASTEST_LINKS]
    latencies, byte_times = [], []
    for address, rate in bytes_per_s.items():
        with contextlib.closing(_Probe(transport, address)) as probe:
            latencies.append(probe.round_trip_s() / 2)
            if address in alike:
                own = probe.bytes_per_s(_TRANSPORT_S, 2 * latencies[-1], reverse=False, rough=rate)
                byte_times.append(1 / own - 1 / rate)
    return TransportTime(statistics.median(latencies), max(0.0, statistics.median(byte_times)))


def measure_flows(command: MeasureFlows) -> FlowsMeasured:
    """Run several iperf3 tests at the same time; a failure goes into the answer's ``error``."""
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
        omit_s=0,  # the middle of the intervals is taken
        block_bytes=_block_bytes(flow.rough_bytes_per_s),
    )
    return rate.bytes_per_s if rate.middle_bytes_per_s is None else rate.middle_bytes_per_s


def _bandwidth(probe: _Probe, command: MeasureLink, round_trip_s: float, rough: float | None) -> tuple[float, str]:
    """Bytes/s, and the iperf3 that measured it; empty where the transport did."""
    if command.iperf_port is not None:
        with contextlib.suppress(Iperf3MissingError):
            rate = measure_bandwidth(
                host_of(command.address),
                command.iperf_port,
                seconds=command.seconds,
                reverse=command.reverse,
                block_bytes=_block_bytes(rough),
            )
            return rate.bytes_per_s, iperf3_source()
    return probe.bytes_per_s(command.seconds, round_trip_s, reverse=command.reverse, rough=rough), ""


def _block_bytes(rough: float | None) -> int | None:
    """Block size for iperf3, which counts whole blocks: small enough that an interval on a slow link holds many."""
    if rough is None:
        return None
    fits = rough * INTERVAL_S / _BLOCKS
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
        """One-way time by message size, smallest first, until the next size would exceed the command's limit.

        The message goes one way and an empty one the other; the latter's time, the latency, is subtracted.
        """
        times: list[MessageTime] = []
        for size in sorted(command.message_bytes):
            if times and times[-1].one_way_s * size / times[-1].message_bytes > command.message_limit_s:
                break  # extrapolated in proportion, which overestimates where latency dominates
            median_s = self._median_echo_s(size, reverse=command.reverse)
            times.append(MessageTime(size, max(median_s - latency_s, median_s / 2)))
        return tuple(times)

    def _median_echo_s(self, size: int, *, reverse: bool) -> float:
        payload = None if reverse else bytes(size)
        taken: list[float] = []
        while len(taken) < _MIN_MESSAGES or sum(taken) < _MESSAGES_S:
            taken.append(self._echo(payload, reply_bytes=size if reverse else 0))
        return statistics.median(taken)

    def bytes_per_s(self, seconds: float, round_trip_s: float, *, reverse: bool, rough: float | None) -> float:
        """Bandwidth from frames of 1 MiB at most, each answered with a few bytes, less the round trip.

        At most half of the time is subtracted: on a busy machine a round trip may take as long as a frame. A link whose
        ``rough`` rate is so slow that some frames would take longer than ``seconds`` gets smaller ones.
        """
        fits = _FRAME_BYTES if rough is None else int(rough * seconds / _FRAMES)
        size = max(_MIN_FRAME_BYTES, min(_FRAME_BYTES, fits))
        frame = bytes(size)
        times: list[float] = []
        while sum(times) < seconds or len(times) < _FRAMES:
            times.append(self._echo(reply_bytes=size) if reverse else self._echo(payload=frame))
        median_s = statistics.median(times)
        return size / max(median_s - round_trip_s, median_s / 2)

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
