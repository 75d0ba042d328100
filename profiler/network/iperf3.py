"""Both ends of one bandwidth measurement by iperf3.

An agent at one end starts an ``Iperf3Server``, an agent at the other calls ``measure_bandwidth``. Both raise
``Iperf3MissingError`` where iperf3 is not installed, so that the caller can measure over its own transport instead.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import os
import re
import select
import shutil
import statistics
import subprocess
import time
from types import TracebackType
from typing import Self

import msgspec

from helixbench.errors import MeasurementError

OMIT_S = 1  # of each measurement's start: TCP is still finding the link's rate
INTERVAL_S = 0.2  # for which rates are reported
MIN_INTERVALS = 4
DEFAULT_BLOCK_BYTES = 128 * 1024
MAX_BITS_PER_S = 1e15  # beyond any link: a counter that overflowed
CONNECT_TIMEOUT_S = 5.0
GRACE_S = 15.0  # for connecting, exchanging results and a slow machine, on top of the time measured
SERVER_READY_TIMEOUT_S = 10.0
SERVER_IDLE_TIMEOUT_S = 120
_NAN = re.compile(r"(?<=[:\s,\[])-?nan(?=[\s,}\]])", re.IGNORECASE)  # printed for a rate over no time; not JSON


class Iperf3MissingError(MeasurementError):
    """iperf3 is not installed on this machine."""


class TcpRate(msgspec.Struct, frozen=True):
    """Payload rate of one TCP connection.

    ``bytes_per_s`` is counted by the receiver. ``middle_bytes_per_s`` is the client's rate over the middle half of the
    intervals, in which all of several concurrent tests run; ``None`` for too few intervals.
    """

    bytes_per_s: float
    middle_bytes_per_s: float | None = None


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
    """Output of the program for that option. Cached: on a fraction of a core starting it takes a while."""
    try:
        done = _run([program, option], timeout_s=GRACE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MeasurementError(f"{program} {option}: {error}") from error
    return done.stdout + done.stderr


def _run(command: list[str], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",  # error messages come in the user's locale
        check=False,
        timeout=timeout_s,
    )


class Iperf3Server:
    """An iperf3 server for one measurement, listening from construction until it is closed or has served.

    It is closed at exit of this process at the latest. Where iperf3 supports it, it also ends after
    ``SERVER_IDLE_TIMEOUT_S`` without a client, so a killed process leaves none behind.

    Args:
        port: TCP port; choose a free one.
        host: address to listen on; all of them by default.

    Raises:
        Iperf3MissingError: iperf3 is not on the ``PATH``.
        MeasurementError: it does not listen, e.g. because the port is taken.
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
        """Stop the server if it still runs."""
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
        # A trial connection would use up its one measurement, so its own output is read instead.
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
    """Rate of the TCP payload received during ``seconds``, after ``omit_s`` that are not counted.

    Args:
        server: host name or address of an ``Iperf3Server``.
        port: its port.
        seconds: rounded up; iperf3 takes whole seconds only.
        reverse: measure from the server to this process instead.
        omit_s: time for TCP to find the link's rate.
        block_bytes: size of one write; iperf3's own by default. iperf3 counts whole blocks.

    Raises:
        Iperf3MissingError: iperf3 is not on the ``PATH``.
        MeasurementError: no connection, no result in time, or a result without a rate.
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
        done = _run(command, timeout_s=limit_s)
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"{origin}: no result within {limit_s:g} s") from error
    if not done.stdout.strip():
        raise MeasurementError(f"{origin}: exit code {done.returncode}, {_one_line(done.stderr) or 'nothing said'}")
    return read_rate(done.stdout, origin=origin)


def read_rate(output: str, *, origin: str) -> TcpRate:
    """Receiver's rate from ``iperf3 --json``; the sender's rate would count what still lies in its own buffers.

    Only these few numbers are read, each by itself: an odd one elsewhere in the report does not spoil the rate. The
    first document counts where there are several (iperf3 3.16 and 3.17 may print theirs twice).

    Raises:
        MeasurementError: iperf3 reports an error (it may still exit with code 0), or there is no rate above 0.
    """
    try:
        report, _ = json.JSONDecoder().raw_decode(_NAN.sub("null", output.lstrip()))
    except (json.JSONDecodeError, RecursionError) as error:
        raise MeasurementError(f"{origin}: its output is not JSON ({error})") from error
    if (reason := _at(report, "error")) is not None:
        raise MeasurementError(f"{origin}: {_one_line(str(reason))}")
    bits_per_s = _rate(_at(report, "end", "sum_received"))
    if not bits_per_s:
        raise MeasurementError(f"{origin}: nothing arrived; measure for longer or check the route between the two")
    intervals = _at(report, "intervals")
    sums = [_at(interval, "sum") for interval in intervals] if isinstance(intervals, list) else []
    rates = [rate for one in sums if not _at(one, "omitted") and (rate := _rate(one)) is not None]
    outer = len(rates) // 4
    middle = rates[outer : len(rates) - outer] if len(rates) >= MIN_INTERVALS else []
    return TcpRate(bits_per_s / 8, statistics.fmean(middle) / 8 if middle else None)


def _at(tree: object, *path: str) -> object:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _rate(tree: object) -> float | None:
    """Bits/s of one of the report's sums; ``None`` where it is missing or impossible."""
    value = _at(tree, "bits_per_second")
    if not isinstance(value, int | float) or not 0 <= value < MAX_BITS_PER_S:
        return None
    return float(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())
