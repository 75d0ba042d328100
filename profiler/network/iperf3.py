"""Bandwidth of a link by iperf3: both ends of one measurement.

An agent at one end starts an ``Iperf3Server``, an agent at the other calls ``measure_bandwidth``. Where iperf3 is not
installed both raise ``Iperf3MissingError``, and the caller may measure with its own transport, saying so in ``source``.
"""

from __future__ import annotations

import atexit
import functools
import math
import os
import re
import select
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import msgspec

from helixbench.errors import MeasurementError

OMIT_S = 1  # of each measurement's start: TCP is still finding the link's rate
INTERVAL_S = 0.2  # over which rates are compared with each other
MIN_INTERVALS = 4
MIN_BLOCKS = 16  # in an interval: below that the spread is of whole blocks, not of the link
DEFAULT_BLOCK_BYTES = 128 * 1024
CONNECT_TIMEOUT_S = 5.0
GRACE_S = 15.0  # for connecting, exchanging results and a slow machine, on top of the time measured
SERVER_READY_TIMEOUT_S = 10.0
SERVER_IDLE_TIMEOUT_S = 120


class Iperf3MissingError(MeasurementError):
    """There is no iperf3 on this machine."""


class TcpRate(msgspec.Struct, frozen=True):
    """What one TCP connection carried.

    ``bytes_per_s`` is the receiver's count of payload, ``middle_bytes_per_s`` the client's over the middle half of the
    intervals: where several tests run at once, all of them run then. ``spread`` is half the interquartile range over
    the median of the rate in the intervals, ``retransmitted`` the part of the segments that was sent again. ``None``
    where iperf3 gives too little to tell.
    """

    bytes_per_s: float
    spread: float | None = None
    retransmitted: float | None = None
    middle_bytes_per_s: float | None = None


class _Sum(msgspec.Struct, frozen=True):
    bits_per_second: float
    bytes: int = 0
    retransmits: int | None = None
    omitted: bool = False


class _Interval(msgspec.Struct, frozen=True):
    sum: _Sum | None = None


class _Start(msgspec.Struct, frozen=True):
    tcp_mss_default: int = 0


class _End(msgspec.Struct, frozen=True):
    sum_sent: _Sum | None = None
    sum_received: _Sum | None = None


class _Report(msgspec.Struct, frozen=True):
    """The part of iperf3's JSON that is read here; the rest of it is iperf3's own business."""

    start: _Start = _Start()
    intervals: tuple[_Interval, ...] = ()
    end: _End = _End()
    error: str | None = None


def iperf3_program() -> str:
    """Path of iperf3.

    Raises:
        Iperf3MissingError: it is not on the ``PATH``.
    """
    path = shutil.which("iperf3")
    if path is None:
        raise Iperf3MissingError("iperf3 is not installed; install the package iperf3 to measure links with it")
    return path


def iperf3_source() -> str:
    """Name and version, for a link's ``source``: ``"iperf3 3.12"``.

    Raises:
        Iperf3MissingError: it is not on the ``PATH``.
    """
    version = re.match(r"iperf (\S+)", _says(iperf3_program(), "--version"))
    return f"iperf3 {version[1]}" if version else "iperf3"


@functools.cache
def _says(program: str, option: str) -> str:
    """What the program prints for that option; asked once, for on a small share of a core that takes a while."""
    done = subprocess.run([program, option], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


class Iperf3Server:
    """An iperf3 server that takes one measurement, listening from construction until it is closed or has served.

    Closed at the latest when this process exits. Where iperf3 can, it also gives up by itself after
    ``SERVER_IDLE_TIMEOUT_S`` without a client, so that none is left behind by a process that was killed.

    Args:
        port: TCP port; choose a free one.
        host: address to listen on; all of them by default.

    Raises:
        Iperf3MissingError: iperf3 is not on the ``PATH``.
        MeasurementError: it did not begin to listen, e.g. because the port is taken.
    """

    def __init__(self, port: int, *, host: str | None = None) -> None:
        self.port = port
        program = iperf3_program()
        command = [program, "--server", "--one-off", "--port", str(port), "--forceflush", "--interval", "0"]
        if host is not None:
            command += ["--bind", host]
        if "--idle-timeout" in _says(program, "--help"):
            command += ["--idle-timeout", str(SERVER_IDLE_TIMEOUT_S)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        atexit.register(self.close)
        try:
            self._await_listening()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop it, if it still runs."""
        atexit.unregister(self.close)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _await_listening(self) -> None:
        # A connection to try it would use up the one measurement that it takes, so its own word is waited for.
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.perf_counter() + SERVER_READY_TIMEOUT_S
        said = b""
        while b"listening" not in said:
            is_readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.perf_counter()))
            chunk = os.read(descriptor, 4096) if is_readable else b""
            if not chunk:
                reason = _one_line(said.decode(errors="replace")) or f"silent for {SERVER_READY_TIMEOUT_S:g} s"
                raise MeasurementError(f"iperf3 server on port {self.port} does not listen: {reason}")
            said += chunk


def measure_bandwidth(
    server: str,
    port: int,
    *,
    seconds: float,
    reverse: bool = False,
    omit_s: float = OMIT_S,
    block_bytes: int | None = None,
) -> TcpRate:
    """TCP payload that arrived over ``seconds`` after the first ``omit_s``, which are not counted.

    Args:
        server: host name or address of an ``Iperf3Server``.
        port: its port.
        seconds: how long to count; rounded up, for iperf3 takes whole seconds only.
        reverse: measure from the server to here instead of from here to the server.
        omit_s: how long TCP is left alone to find the link's rate.
        block_bytes: how much is written and read at once; iperf3's own size by default. Rates of intervals are counted
            in whole blocks.

    Raises:
        Iperf3MissingError: iperf3 is not on the ``PATH``.
        MeasurementError: no connection, or no number out of it.
    """
    counted_s = max(1, math.ceil(seconds))
    command = [iperf3_program(), "--client", server, "--port", str(port), "--json"]
    command += ["--time", str(counted_s), "--omit", f"{omit_s:g}", "--interval", f"{INTERVAL_S:g}"]
    command += ["--connect-timeout", str(round(CONNECT_TIMEOUT_S * 1e3))]
    command += ["--reverse"] if reverse else []
    command += ["--length", str(block_bytes)] if block_bytes is not None else []
    limit_s = counted_s + omit_s + CONNECT_TIMEOUT_S + GRACE_S
    origin = f"iperf3 {'from' if reverse else 'to'} {server}:{port}"
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=limit_s
        )
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"{origin}: no result within {limit_s:g} s") from error
    if not done.stdout.strip():
        raise MeasurementError(f"{origin}: exit code {done.returncode}, {_one_line(done.stderr) or 'nothing said'}")
    return read_rate(done.stdout, origin=origin, block_bytes=block_bytes or DEFAULT_BLOCK_BYTES)


def read_rate(output: str, *, origin: str, block_bytes: int = DEFAULT_BLOCK_BYTES) -> TcpRate:
    """The receiver's rate out of ``iperf3 --json``.

    The sender's rate counts what lies in its own buffers; and iperf3 may report a failure and exit with code 0.

    Raises:
        MeasurementError: an error is reported, or no rate above 0.
    """
    try:
        report = msgspec.json.decode(output, type=_Report)
    except msgspec.DecodeError as error:
        raise MeasurementError(f"{origin}: its output cannot be read ({error})") from error
    if report.error is not None:
        raise MeasurementError(f"{origin}: {report.error}")
    if report.end.sum_received is None or report.end.sum_received.bits_per_second <= 0:
        raise MeasurementError(f"{origin}: nothing arrived; measure for longer or look at the route between the two")
    counted = [part.sum for part in report.intervals if part.sum is not None and not part.sum.omitted]
    outer = len(counted) // 4
    middle = counted[outer : len(counted) - outer] if len(counted) >= MIN_INTERVALS else []
    return TcpRate(
        report.end.sum_received.bits_per_second / 8,
        spread=_interval_spread(counted, block_bytes),
        retransmitted=_retransmitted(report),
        middle_bytes_per_s=statistics.fmean(part.bits_per_second for part in middle) / 8 if middle else None,
    )


def _interval_spread(counted: Sequence[_Sum], block_bytes: int) -> float | None:
    """``None`` for too few intervals, or where so few blocks fit in one that whole blocks make the spread."""
    if len(counted) < MIN_INTERVALS:
        return None
    if statistics.median(part.bytes for part in counted) < MIN_BLOCKS * block_bytes:
        return None
    low, middle, high = statistics.quantiles((part.bits_per_second for part in counted), n=4, method="inclusive")
    return (high - low) / 2 / middle


def _retransmitted(report: _Report) -> float | None:
    sent, segment_bytes = report.end.sum_sent, report.start.tcp_mss_default
    if sent is None or sent.retransmits is None or sent.bytes <= 0 or segment_bytes <= 0:
        return None
    return sent.retransmits * segment_bytes / sent.bytes


def _one_line(text: str) -> str:
    return " ".join(text.split())
