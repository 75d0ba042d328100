"""The doctor's edge: facts of this machine, of agents, and the command."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from helixbench.errors import InputError
from helixbench.records import decode_record
from helixbench.reference_server.doctor import doctor
from helixbench.reference_server.doctor import gather as doctor_gather
from helixbench.reference_server.doctor.cli import doctor as command
from helixbench.reference_server.doctor.doctor import (
    EVERYWHERE,
    HERE,
    Diagnosis,
    diagnose_agents,
    diagnose_here,
    examine_listening,
)
from helixbench.reference_server.doctor.facts import NodeFacts
from helixbench.reference_server.doctor.gather import gather_facts, nvml_facts, torch_uuids
from helixbench.reference_server.wire.keys import make_key_file
from tests.reference_server.doctor.test_checks import HEALTHY
from tests.reference_server.threads import agents_in_threads


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    make_key_file(tmp_path / "cluster.key")
    return tmp_path / "cluster.key"


@pytest.fixture
def taken() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_facts_of_this_machine_are_told_and_travel() -> None:
    facts = gather_facts()

    assert facts.versions["torch"]
    assert any(text.startswith("torch") for text in facts.requirements)
    assert facts.usable_cores <= facts.logical_cores
    assert facts.disk_free_bytes is not None
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(facts), type=NodeFacts) == facts


def test_memory_and_capabilities_are_read_from_proc() -> None:
    assert doctor_gather._meminfo("MemTotal: 9 kB\nMemAvailable:   2 kB\nHugePages: 3\n")["MemAvailable"] == 2048
    assert doctor_gather._has_capability("Name: x\nCapEff:\t0000000000001000\n", doctor_gather.CAP_NET_ADMIN) is True
    assert doctor_gather._has_capability("CapEff:\t0000000000000fff\n", doctor_gather.CAP_NET_ADMIN) is False
    assert doctor_gather._has_capability("", doctor_gather.CAP_NET_ADMIN) is None


class _NvmlError(Exception):
    pass


def fake_nvml(**changes: Any) -> Any:
    def unsupported(*_: object) -> None:
        raise _NvmlError("Not Supported")

    functions = {
        "NVMLError": _NvmlError,
        "NVML_FEATURE_ENABLED": 1,
        "NVML_DEVICE_MIG_ENABLE": 1,
        "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1,
        "NVML_VOLATILE_ECC": 0,
        "NVML_TEMPERATURE_GPU": 0,
        "NVML_CLOCK_SM": 1,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 12080,
        "nvmlSystemGetDriverVersion": lambda: "570.86",
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda _: "L4",
        "nvmlDeviceGetUUID": lambda _: "GPU-9",
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=1, total=10),
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda _: 0x40,
        "nvmlDeviceGetPersistenceMode": lambda _: 0,
        "nvmlDeviceGetMigMode": unsupported,
        "nvmlDeviceGetEccMode": lambda _: [1, 1],
        "nvmlDeviceGetTotalEccErrors": lambda *_: 2,
        "nvmlDeviceGetTemperature": lambda *_: 90,
        "nvmlDeviceGetClockInfo": lambda *_: 300,
        "nvmlDeviceGetMaxClockInfo": lambda *_: 2040,
    }
    return SimpleNamespace(**(functions | changes))


def test_nvml_tells_of_each_gpu_what_it_supports() -> None:
    facts = nvml_facts(fake_nvml())

    (gpu,) = facts["gpus"]
    assert (facts["driver"], facts["driver_cuda"]) == ("570.86", "12.8")
    assert (gpu.throttle_reasons, gpu.is_persistent, gpu.is_mig, gpu.uncorrected_errors) == (0x40, False, None, 2)
    assert (gpu.sm_frequency_hz, gpu.sm_max_frequency_hz) == (300e6, 2040e6)


def test_torch_tells_the_uuids_that_it_sees_as_nvml_writes_them() -> None:
    def fail(_: int) -> None:
        raise RuntimeError("CUDA driver initialization failed")

    sees = SimpleNamespace(
        device_count=lambda: 2, get_device_properties=lambda index: SimpleNamespace(uuid=f"{8 - index}-x")
    )
    assert torch_uuids(sees) == ("GPU-8-x", "GPU-7-x")
    assert torch_uuids(SimpleNamespace(device_count=lambda: 0)) == ()
    assert torch_uuids(SimpleNamespace(device_count=lambda: 1, get_device_properties=fail)) is None


def test_a_driver_that_is_not_there_is_told() -> None:
    def fail() -> None:
        raise _NvmlError("Driver Not Loaded")

    assert nvml_facts(fake_nvml(nvmlInit=fail)) == {"nvml_problem": "Driver Not Loaded"}


def test_a_taken_port_is_a_problem_and_a_free_one_is_not(taken: str) -> None:
    assert examine_listening(taken).state == "problem"
    assert examine_listening("127.0.0.1:0").state == "ok"
    assert examine_listening("127.0.0.1:x").state == "problem"


def test_agents_are_examined_and_an_absent_one_is_a_problem(
    key_file: Path, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with agents_in_threads(["a", "b"], key_file) as addresses, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{closed.getsockname()[1]}"
        found = diagnose_agents(addresses | {"gone": gone}, key_file)

    assert set(found.facts) == {"a", "b"}
    assert [finding.state for finding in found.findings["gone"]] == ["problem"]
    clock = [finding for finding in found.findings["a"] if finding.check == "clock offset"]
    assert [finding.state for finding in clock] == ["ok"]
    assert {finding.check for finding in found.findings[EVERYWHERE]} == {"torch everywhere", "transformers everywhere"}
    assert found.num_problems >= 1


def test_what_listens_but_is_no_agent_is_a_problem(key_file: Path, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixbench.reference_server.wire.client._CONNECT_S", 0.3)
    found = diagnose_agents({"odd": taken}, key_file)

    assert [(finding.check, finding.state) for finding in found.findings["odd"]] == [
        ("reach", "ok"),
        ("agent", "problem"),
    ]


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setattr(doctor, "diagnose_here", lambda listen: diagnose_here(listen, gather=lambda: HEALTHY))
    made = typer.Typer()
    made.command()(command)
    return made


def test_the_command_ends_with_0_or_with_1_for_a_problem(app: typer.Typer, taken: str) -> None:
    well = CliRunner().invoke(app, [])
    assert well.exit_code == 0
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
        (["--agent", "a=h:1", "--agent", "a=h:2", "--key", "k"], "stands twice"),
        (["--agent", "a=h:1", "--listen", "h:1"], "give one of them"),
        (["--listen", "h:99999"], "--listen h:99999: need HOST:PORT with a port of 0 to 65535"),
        (["--listen", "here"], "--listen here: need HOST:PORT"),
        (["--agent", "a=h:99999", "--key", "k"], "--agent a=h:99999: need HOST:PORT with a port of 1 to 65535"),
    ],
)
def test_wrong_options_are_refused(app: typer.Typer, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, options)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
