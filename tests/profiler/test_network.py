from __future__ import annotations

import itertools
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler import network
from profiler.errors import MeasurementError
from profiler.network import (
    Iperf3MissingError,
    Iperf3Server,
    iperf3_source,
    measure_bandwidth,
    received_bytes_per_s,
    rounds,
)

needs_iperf3 = pytest.mark.skipif(shutil.which("iperf3") is None, reason="iperf3 is not installed")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@given(num_names=st.integers(0, 17))
def test_rounds_hold_every_ordered_pair_once_and_no_node_twice(num_names: int) -> None:
    names = [f"n{index}" for index in range(num_names)]

    schedule = rounds(names)

    assert sorted(itertools.chain(*schedule)) == sorted(itertools.permutations(names, 2))
    for pairs in schedule:
        busy = list(itertools.chain(*pairs))
        assert len(busy) == len(set(busy))
    if num_names >= 2:
        assert len(schedule) == 2 * (num_names - 1 + num_names % 2)


def test_the_receivers_rate_is_taken() -> None:
    output = '{"end": {"sum_sent": {"bits_per_second": 9e9}, "sum_received": {"bits_per_second": 8e8, "bytes": 1}}}'
    assert received_bytes_per_s(output, origin="x") == 1e8


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ('{"start": {}, "end": {}, "error": "unable to connect to server"}', "x: unable to connect"),
        ('{"end": {}, "error": "SERVER ERROR - busy", "error": "busy"}', "x: busy"),
        ('{"end": {}}', "nothing arrived"),
        ('{"end": {"sum_received": {"bits_per_second": 0}}}', "nothing arrived"),
        ('{"end": {"sum_received": {"bits_per_second": -nan}}}', "cannot be read"),
        ('{"end": ', "cannot be read"),
    ],
)
def test_output_without_a_rate_is_an_error(output: str, reason: str) -> None:
    with pytest.raises(MeasurementError, match=reason):
        received_bytes_per_s(output, origin="x")


def test_missing_iperf3_has_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Iperf3MissingError, match="install"):
        measure_bandwidth("127.0.0.1", 5201, seconds=1)
    with pytest.raises(Iperf3MissingError):
        Iperf3Server(5201)
    with pytest.raises(Iperf3MissingError):
        iperf3_source()


def test_a_client_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stuck = tmp_path / "iperf3"
    stuck.write_text(
        f"#!{sys.executable}\nimport os, time\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(100)\n"
    )
    stuck.chmod(stuck.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(network, "GRACE_S", -5.0)

    with pytest.raises(MeasurementError, match="no result within"):
        measure_bandwidth("127.0.0.1", 5201, seconds=1)

    assert not is_running(int((tmp_path / "pid").read_text()))


@needs_iperf3
def test_both_directions_are_measured() -> None:
    for reverse in (False, True):
        port = free_port()
        with Iperf3Server(port, host="127.0.0.1"):
            assert measure_bandwidth("127.0.0.1", port, seconds=1, reverse=reverse) > 1e6


@needs_iperf3
def test_nobody_listening_is_an_error_though_iperf3_exits_with_0() -> None:
    with pytest.raises(MeasurementError, match="unable to connect"):
        measure_bandwidth("127.0.0.1", free_port(), seconds=1)


@needs_iperf3
def test_a_taken_port_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(MeasurementError, match="Address already in use"):
            Iperf3Server(taken.getsockname()[1], host="127.0.0.1")


@needs_iperf3
def test_a_closed_server_is_gone() -> None:
    port = free_port()
    with Iperf3Server(port, host="127.0.0.1") as server:
        pid = server._process.pid
        assert is_running(pid)
    assert not is_running(pid)
    server.close()


@needs_iperf3
def test_a_server_ends_with_the_process_that_started_it() -> None:
    code = f"""
import sys
from profiler.network import Iperf3Server
server = Iperf3Server({free_port()}, host="127.0.0.1")
print(server._process.pid, flush=True)
sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert not is_running(int(done.stdout))


@needs_iperf3
def test_the_source_names_the_version() -> None:
    assert iperf3_source().startswith("iperf3 3.")
