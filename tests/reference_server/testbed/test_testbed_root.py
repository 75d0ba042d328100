"""The isolated testbed: real namespaces and shaped links."""

import json
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest

from helixbench.reference_server.testbed import spec
from tests.reference_server.testbed.beds import (
    MBIT,
    left_behind,
    needs_iperf3,
    needs_root,
    output_of,
    run_id_of,
    run_script,
    small_spec,
    start,
)
from tests.reference_server.testbed.test_testbed_plain import CALL

pytestmark = [pytest.mark.root, needs_root]

# Answers one call on the socket that it was handed, with the interfaces that it sees.
ANSWER = """
import os, socket, sys
server = socket.socket(fileno=int(sys.argv[1]))
connection, _ = server.accept()
connection.sendall(",".join(sorted(name for _, name in socket.if_nameindex())).encode())
connection.close()
sys.exit(3)
"""
BANDWIDTH_TOLERANCE = 0.05


def test_driver_and_agents_are_in_their_own_namespaces(tmp_path: Path) -> None:
    with start(small_spec(card=100 * MBIT), tmp_path, mode="child") as bed:
        run_id = run_id_of(bed)
        callers = {
            output_of(bed, [sys.executable, "-S", "-c", CALL, address], tmp_path / "out").strip()
            for address in bed.addresses.values()
        }
        hosts = {address.rpartition(":")[0] for address in bed.addresses.values()}
        assert len([path for path in left_behind(run_id) if path.startswith("/run/netns")]) == 4

    assert bed.isolated
    assert "bandwidth by tc htb" in bed.description
    assert len(hosts) == 2
    assert len(callers) == 1
    assert not callers & hosts
    assert left_behind(run_id) == []


def test_socket_made_outside_is_served_by_the_driver_inside(tmp_path: Path) -> None:
    answers = []
    with start(small_spec(), tmp_path) as bed, socket.create_server(("127.0.0.1", 0)) as server:

        def call() -> None:
            with socket.create_connection(server.getsockname(), timeout=10) as connection:
                answers.append(connection.recv(99).decode())

        caller = threading.Thread(target=call)
        caller.start()
        code = bed.run_driver([sys.executable, "-S", "-c", ANSWER, str(server.fileno())], pass_fds=[server.fileno()])
        caller.join()

    assert code == 3
    assert answers == ["eth0,lo"]


@needs_iperf3
def test_card_and_link_carry_what_the_file_says(tmp_path: Path) -> None:
    link = spec.LinkSpec(between=("coordinator", "small"), bandwidth_bytes_per_s=80 * MBIT)
    with start(small_spec(card=400 * MBIT, links=(link,)), tmp_path, mode="iperf") as bed:
        measured = {
            (name, direction): _iperf3(bed, bed.addresses[name].rpartition(":")[0], direction, tmp_path / "out")
            for name in ("big", "small")
            for direction in ("out", "in")
        }

    for (name, _), bytes_per_s in measured.items():
        asked = (400 if name == "big" else 80) * MBIT
        assert bytes_per_s == pytest.approx(asked, rel=BANDWIDTH_TOLERANCE), measured


def _iperf3(bed: object, host: str, direction: str, into: Path) -> float:
    argv = ["iperf3", "-J", "-c", host, "-t", "1", "-O", "0.3", *(["-R"] if direction == "in" else [])]
    report = json.loads(output_of(bed, argv, into))  # type: ignore[arg-type]
    return float(report["end"]["sum_received"]["bits_per_second"]) / 8


def test_all_is_gone_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), start(small_spec(), tmp_path, mode="child") as bed:  # noqa: PT012
        run_id = run_id_of(bed)
        raise RuntimeError("mine")

    assert left_behind(run_id) == []


@pytest.mark.parametrize("num_signals", [1, 5])
def test_all_is_gone_after_ctrl_c_however_often(tmp_path: Path, num_signals: int) -> None:
    with run_script("hold", str(tmp_path)) as process:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        for _ in range(num_signals):
            process.send_signal(signal.SIGINT)
            threading.Event().wait(0.01)
        process.communicate(timeout=20)

    assert run_id
    assert left_behind(run_id) == []


def test_all_is_gone_after_sigterm(tmp_path: Path) -> None:
    with run_script("hold", str(tmp_path)) as process:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        process.terminate()
        process.communicate(timeout=20)

    assert process.returncode == 128 + signal.SIGTERM
    assert left_behind(run_id) == []


def test_ctrl_c_is_the_drivers_to_answer(tmp_path: Path) -> None:
    with run_script("driver", str(tmp_path)) as process:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        assert process.stdout.readline() == "driver up\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)

    assert process.returncode == 5, errors
    assert left_behind(run_id) == []


def test_next_start_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    with run_script("hold", str(tmp_path)) as process:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        process.kill()
        process.communicate(timeout=20)
    assert [path for path in left_behind(run_id) if path.startswith("/run/netns")]

    with start(small_spec(), tmp_path):
        assert left_behind(run_id) == []
