"""The doctor's edge: descriptions of this machine and of agents, and the command."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from helixbench.errors import InputError
from helixbench.profiler.device import Facts
from helixbench.records import decode_record
from helixbench.reference_server import doctor
from helixbench.reference_server.commands.doctor import doctor as command
from helixbench.reference_server.doctor import EVERYWHERE, HERE, Diagnosis, diagnose_agents, diagnose_here
from helixbench.reference_server.wire.keys import make_key_file
from tests.reference_server.test_fitness import HEALTHY
from tests.reference_server.threads import agents_in_threads


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    make_key_file(tmp_path / "cluster.key")
    return tmp_path / "cluster.key"


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_this_machine_is_described_and_its_facts_travel() -> None:
    found = diagnose_here()

    facts = found.facts[HERE]
    assert facts.devices[0].kind == "cpu"
    assert facts.versions["torch"]
    assert msgspec.json.decode(msgspec.json.encode(found), type=Diagnosis) == found
    assert {"python", "torch", "iperf3", "load", "testbeds"} <= {finding.check for finding in found.findings[HERE]}


@pytest.mark.parametrize(
    ("num_devices", "driver", "torch_cuda", "state", "says"),
    [
        (0.0, {}, None, "ok", "no NVIDIA device"),
        (1.0, {"nvml": "not available: Driver Not Loaded"}, "12.8", "problem", "NVML is not available: Driver Not"),
        (1.0, {"driver": "570", "cuda_driver": "12.8"}, None, "problem", "built without CUDA"),
        (1.0, {"driver": "570", "cuda_driver": "12.8"}, "13.0", "problem", "CUDA 13.0, driver 570 supports up to 12.8"),
        (1.0, {"driver": "570", "cuda_driver": "12.8"}, "12.9", "problem", "sees no GPU; CUDA_VISIBLE_DEVICES is '7'"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_explained(
    monkeypatch: pytest.MonkeyPatch,
    num_devices: float,
    driver: Facts,
    torch_cuda: str | None,
    state: str,
    says: str,
) -> None:
    monkeypatch.setattr("helixbench.profiler.device.driver_facts", lambda: driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    (finding,) = doctor._unseen_gpus({"nvidia_devices": num_devices}, torch_cuda)

    assert finding.state == state
    assert says in finding.says


def test_a_taken_port_is_a_problem_and_a_free_one_is_not(taken: str) -> None:
    states = [doctor._listening(address).state for address in (taken, "127.0.0.1:0", "127.0.0.1:x")]
    assert states == ["problem", "ok", "problem"]


def test_agents_are_examined_and_an_absent_one_is_a_problem(key_file: Path) -> None:
    with agents_in_threads(["a", "b"], key_file) as addresses, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{closed.getsockname()[1]}"
        found = diagnose_agents(addresses | {"gone": gone}, key_file)

    assert set(found.facts) == {"a", "b"}
    assert [finding.state for finding in found.findings["gone"]] == ["problem"]
    assert {"reach", "python", "disk"} <= {finding.check for finding in found.findings["a"]}
    assert {finding.check for finding in found.findings[EVERYWHERE]} == {"torch everywhere", "transformers everywhere"}
    assert found.count("problem") >= 1


def test_what_listens_but_is_no_agent_is_a_problem(key_file: Path, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixbench.reference_server.wire.client._CONNECT_S", 0.3)
    found = diagnose_agents({"odd": taken}, key_file)

    assert [(finding.check, finding.state) for finding in found.findings["odd"]] == [
        ("reach", "ok"),
        ("agent", "problem"),
    ]


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setattr(doctor, "_describe_here", lambda: (HEALTHY, []))
    monkeypatch.setattr("helixbench.reference_server.testbed.namespaces.why_no_namespaces", str)
    made = typer.Typer()
    made.command()(command)
    return made


def test_the_command_ends_with_0_or_with_1_for_a_problem(app: typer.Typer, taken: str) -> None:
    well = CliRunner().invoke(app, [])
    assert well.exit_code == 0, well.output
    assert "0 problems, 0 warnings" in well.stdout
    ill = CliRunner().invoke(app, ["--listen", taken])
    assert ill.exit_code == 1
    assert "PROBLEM port" in ill.stdout
    assert "-> end what listens there" in ill.stdout


def test_json_is_the_record(app: typer.Typer) -> None:
    shown = CliRunner().invoke(app, ["--json"])
    record = decode_record(shown.stdout.encode(), Diagnosis, origin="stdout")
    assert record.facts == {HERE: HEALTHY}
    assert record.provenance.created


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--agent", "a=h:1"], "give --key"),
        (["--agent", "a:1", "--key", "k"], "need NAME=HOST:PORT"),
        (["--agent", "=h:1", "--key", "k"], "need NAME=HOST:PORT"),
        (["--agent", "a=h:1", "--agent", "a=h:2", "--key", "k"], "duplicate name 'a'"),
        (["--agent", "a=h:1", "--listen", "h:1"], "give one of them"),
        (["--listen", "h:99999"], "--listen h:99999: need HOST:PORT with a port of 0 to 65535"),
        (["--listen", "here"], "--listen here: need HOST:PORT"),
        (["--agent", "a=h:99999", "--key", "k"], "--agent a=h:99999: need NAME=HOST:PORT (need HOST:PORT with a port"),
    ],
)
def test_wrong_options_are_refused(app: typer.Typer, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, options)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
