from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helixbench.errors import MeasurementError
from helixbench.profiler.network import iperf3 as network
from helixbench.profiler.network.iperf3 import (
    Iperf3MissingError,
    Iperf3Server,
    TcpRate,
    iperf3_source,
    measure_bandwidth,
    read_rate,
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


def test_the_receivers_rate_is_taken() -> None:
    output = '{"end": {"sum_sent": {"bits_per_second": 9e9}, "sum_received": {"bits_per_second": 8e8, "bytes": 1}}}'
    assert read_rate(output, origin="x").bytes_per_s == 1e8


def report(rates: list[float], **changes: object) -> dict[str, Any]:
    """Of iperf3: two intervals that are left out, then those of the given rates."""
    sums = [{"bits_per_second": 1.0, "bytes": 1, "omitted": True}] * 2
    sums += [{"bits_per_second": rate, "bytes": 100 << 17, "omitted": False} for rate in rates]
    end = {
        "sum_sent": {"bits_per_second": 9e9, "bytes": 1_000_000, "retransmits": 3},
        "sum_received": {"bits_per_second": 8e8, "bytes": 1_000_000},
    }
    return {"start": {"tcp_mss_default": 1000}, "intervals": [{"sum": one} for one in sums], "end": end} | changes


def test_the_middle_half_of_the_intervals_is_told_apart() -> None:
    rates = [8.0, 8.0, 80.0, 80.0, 160.0, 160.0, 800.0, 800.0]
    assert read_rate(json.dumps(report(rates)), origin="x").middle_bytes_per_s == pytest.approx(15.0)
    assert read_rate(json.dumps(report(rates[:3])), origin="x").middle_bytes_per_s is None


def test_the_first_of_several_documents_counts() -> None:
    first = json.dumps(report([8e8] * 5), indent=1)
    second = first.replace("800000000", "100000000")

    rate = read_rate(f"\n{first}\n{second}\niperf3: exiting\n", origin="x")

    assert rate == read_rate(first, origin="x") == TcpRate(1e8, 1e8)


@pytest.mark.parametrize(
    "changes",
    [
        {"start": None},
        {"start": {"tcp_mss_default": "unknown"}},
        {"intervals": [{"sum": {"bits_per_second": float("nan")}}, {"sum": None}, {}, "?"]},
        {"intervals": {"0": "?"}},
        {"end": {"sum_sent": {"retransmits": -(2**63)}, "sum_received": {"bits_per_second": 8e8}}},
    ],
)
def test_an_odd_figure_elsewhere_in_the_report_does_not_cost_the_rate(changes: dict[str, object]) -> None:
    text = json.dumps(report([8e8] * 5, **changes)).replace("NaN", "-nan")
    assert read_rate(text, origin="x").bytes_per_s == 1e8


def test_intervals_with_impossible_rates_are_left_out() -> None:
    rates = [8.0, 80.0, -1.0, 1e18, 80.0, 8.0]
    assert read_rate(json.dumps(report(rates)), origin="x").middle_bytes_per_s == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ('{"start": {}, "end": {}, "error": "unable to connect to server"}', "x: unable to connect"),
        ('{"end": {}, "error": "SERVER ERROR - busy", "error": "busy"}', "x: busy"),
        ('{"end": {}}', "nothing arrived"),
        ('{"end": {"sum_received": {"bits_per_second": 0}}}', "nothing arrived"),
        ('{"end": {"sum_received": {"bits_per_second": -nan}}}', "nothing arrived"),
        ('{"end": {"sum_received": {"bits_per_second": -8e8}}}', "nothing arrived"),
        ('{"end": ', "is not JSON"),
        ("iperf3: error - busy", "is not JSON"),
    ],
)
def test_output_without_a_rate_is_an_error(output: str, reason: str) -> None:
    with pytest.raises(MeasurementError, match=reason):
        read_rate(output, origin="x")


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
            assert measure_bandwidth("127.0.0.1", port, seconds=1, reverse=reverse).bytes_per_s > 0


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
from helixbench.profiler.network.iperf3 import Iperf3Server
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
