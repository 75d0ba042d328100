import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from helixbench.errors import InputError, MeasurementError
from helixbench.reference_server.testbed import process as agents
from helixbench.reference_server.testbed import run_state, testbed
from tests.reference_server.testbed.beds import (
    dummy_argv,
    left_behind,
    output_of,
    run_id_of,
    run_script,
    small_spec,
    start,
    write_key,
)

CALL = """
import socket, sys
host, _, port = sys.argv[1].rpartition(":")
with socket.create_connection((host, int(port)), timeout=10) as connection:
    print(connection.recv(99).decode())
"""


def test_agents_listen_and_all_is_gone_afterwards(tmp_path: Path) -> None:
    with start(small_spec(), tmp_path / "logs", mode="child", isolate=False) as bed:
        run_id = run_id_of(bed)
        bed.check()
        callers = [
            output_of(bed, [sys.executable, "-S", "-c", CALL, address], tmp_path / "out")
            for address in bed.addresses.values()
        ]
        assert len(left_behind(run_id)) == 2 + 2 * len(bed.addresses)  # state, key; agents and what they started

    assert list(bed.addresses) == ["big", "small"]
    assert callers == ["127.0.0.1\n"] * 2
    assert not bed.isolated
    assert "without network namespaces" in bed.description
    assert left_behind(run_id) == []


def test_agents_are_started_with_what_their_node_says(tmp_path: Path) -> None:
    big, small = small_spec().local_nodes
    pinned = msgspec.structs.replace(big, threads=2, cpus=(0, 1))
    told: dict[str, list[str]] = {}

    def argv_of(options: agents.AgentOptions) -> list[str]:
        told[options.name] = agents.agent_argv(options)
        return dummy_argv()(options)

    bed = msgspec.structs.replace(small_spec(), local_nodes=(pinned, msgspec.structs.replace(small, device="cuda:0")))
    with testbed.start_testbed(bed, log_dir=tmp_path, argv_of=argv_of, make_key=write_key, isolate=False) as running:
        description = running.description

    assert told["big"][-4:] == ["--threads", "2", "--cpus", "0,1"]
    assert told["small"][-4:] == ["--device", "cuda:0", "--threads", "1"]
    assert "1 node on CUDA; 1 node on CPU with 2 threads in all" in description


def test_all_is_gone_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), start(small_spec(), tmp_path, isolate=False) as bed:  # noqa: PT012
        run_id = run_id_of(bed)
        raise RuntimeError("mine")

    assert left_behind(run_id) == []


def test_driver_gives_its_exit_code(tmp_path: Path) -> None:
    with start(small_spec(), tmp_path, isolate=False) as bed:
        assert bed.run_driver(["sh", "-c", "exit 7"]) == 7
        assert bed.run_driver(["sh", "-c", "kill -TERM $$"]) == 128 + signal.SIGTERM
        assert bed.run_driver(["no-such-program"]) == 1


def test_names_the_node_whose_agent_refuses(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"node big: its agent ended with exit code 2(.|\n)*no such device"),
        start(small_spec(), tmp_path, mode="refuse", isolate=False),
    ):
        pass


def test_names_the_node_whose_agent_crashes(tmp_path: Path) -> None:
    with (
        pytest.raises(MeasurementError, match=r"node big: its agent ended with exit code 1(.|\n)*out of luck"),
        start(small_spec(), tmp_path, mode="crash", isolate=False),
    ):
        pass


def test_does_not_wait_for_ever(tmp_path: Path) -> None:
    with (
        pytest.raises(MeasurementError, match=r"node big: its agent was not ready within 0\.3 s"),
        start(small_spec(), tmp_path, mode="silent", isolate=False, ready_timeout_s=0.3),
    ):
        pass


def test_check_names_the_node_whose_agent_was_killed(tmp_path: Path) -> None:
    with start(small_spec(), tmp_path, isolate=False) as bed:
        (victim,) = [
            path
            for path in left_behind(run_id_of(bed))
            if path.startswith("/proc") and _listens(path, bed.addresses["small"])
        ]
        subprocess.run(["kill", "-KILL", Path(victim).name], check=True)
        with pytest.raises(MeasurementError, match="node small: its agent was ended by signal 9"):
            _check_until_raised(bed)


def _listens(process: str, address: str) -> bool:
    """Whether a process is the one whose socket has that port: found by its open files."""
    port = f"{int(address.rpartition(':')[2]):04X}"
    sockets = {
        line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[1].endswith(port)
    }
    links = (str(path.readlink()) for path in (Path(process) / "fd").iterdir())
    return any(link.removeprefix("socket:[").removesuffix("]") in sockets for link in links)


def _check_until_raised(bed: object) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        bed.check()  # type: ignore[attr-defined]
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_all_is_gone_after_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    with run_script("plain", str(tmp_path)) as process:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        process.send_signal(number)
        process.communicate(timeout=20)

    assert run_id
    # Python ends itself with SIGINT where a KeyboardInterrupt was not caught.
    assert process.returncode == (-number if number == signal.SIGINT else 128 + number)
    assert left_behind(run_id) == []


def test_next_start_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    with run_script("plain", str(tmp_path)) as process:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        process.kill()
        process.communicate(timeout=20)
    assert left_behind(run_id)

    with start(small_spec(), tmp_path, isolate=False):
        assert left_behind(run_id) == []


def test_living_runs_and_foreign_files_are_left_alone(tmp_path: Path) -> None:
    living = run_state.owned_run("11111111", namespaces=())
    run_state.save_run(tmp_path, living)
    (tmp_path / "other.json").write_text('{"what": 1}')

    assert run_state.clean_stale(tmp_path) == []
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_run_of_an_earlier_boot_is_forgotten(tmp_path: Path) -> None:
    import msgspec

    state = msgspec.structs.replace(run_state.owned_run("22222222", namespaces=("none-such",)), boot_id="before")
    run_state.save_run(tmp_path, state)

    assert run_state.clean_stale(tmp_path) == ["22222222"]
    assert list(tmp_path.iterdir()) == []
