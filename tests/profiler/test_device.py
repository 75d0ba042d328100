from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from helixbench.errors import InputError
from helixbench.profiler import device
from helixbench.profiler.cluster import Device
from helixbench.profiler.device import (
    NOT_READ,
    Facts,
    cpu_facts,
    describe_device,
    driver_facts,
    merged,
    nvml_facts,
    read_facts,
    torch_cuda_facts,
    with_current_facts,
)
from helixbench.profiler.measure import disturbance

X86 = """processor\t: 0
model name\t: Example CPU 9000 @ 2.0GHz
cpu MHz\t\t: 2500.000
physical id\t: 0
core id\t\t: 0

processor\t: 1
model name\t: Example CPU 9000 @ 2.0GHz
cpu MHz\t\t: 1200.000
physical id\t: 0
core id\t\t: 0

processor\t: 2
model name\t: Example CPU 9000 @ 2.0GHz
cpu MHz\t\t: 1200.000
physical id\t: 0
core id\t\t: 1
"""
ARM = """processor\t: 0
BogoMIPS\t: 50.00
CPU implementer\t: 0x41
"""


class FakeNvmlError(Exception):
    pass


class FakeNvml:
    """Two GPUs, in another order than CUDA's; power is not supported on them."""

    NVMLError = FakeNvmlError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_NVLINK_MAX_LINKS, NVML_FEATURE_ENABLED = 18, 1
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
    nvmlClocksThrottleReasonSwPowerCap = 4  # noqa: N815
    nvmlClocksThrottleReasonHwThermalSlowdown = 64  # noqa: N815
    nvmlClocksThrottleReasonAll = 68  # noqa: N815

    def __init__(self, *, driver_loaded: bool = True) -> None:
        self.driver_loaded = driver_loaded
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver_loaded:
            raise FakeNvmlError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        handles = {"GPU-aaaa": "first", "MIG-bbbb": "slice"}
        if uuid not in handles:
            raise FakeNvmlError("Not Found")
        return handles[uuid]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:  # noqa: N802
        if handle == "slice":
            raise FakeNvmlError("Not Supported")
        return 700_000

    def nvmlDeviceGetNvLinkState(self, handle: str, link: int) -> int:  # noqa: N802
        if link >= 4:
            raise FakeNvmlError("Invalid Argument")
        return int(link != 2)

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetPowerManagementDefaultLimit": 500_000,
            "nvmlDeviceGetApplicationsClock": 1755,
            "nvmlDeviceGetEccMode": (1, 1),
            "nvmlDeviceGetTotalEccErrors": 2,
            "nvmlDeviceGetMigMode": (0, 0),
            "nvmlDeviceGetPersistenceMode": 1,
            "nvmlDeviceGetCurrPcieLinkGeneration": 4,
            "nvmlDeviceGetCurrPcieLinkWidth": 8,
            "nvmlDeviceGetNumaNodeId": 1,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 4,
            "nvmlSystemGetDriverVersion": "570.1",
            "nvmlSystemGetCudaDriverVersion_v2": 12080,
            "nvmlDeviceGetName": "Example GPU",
            "nvmlDeviceGetPciInfo": SimpleNamespace(busId="0000:01:00.0"),
            "nvmlDeviceGetMaxPcieLinkGeneration": 5,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetMaxClockInfo": 1980,
            "nvmlDeviceGetClockInfo": 345,
            "nvmlDeviceGetTemperature": 40,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=1 << 30),
        }
        return lambda *_: answers[name]


def test_cpu_is_described_from_this_machine() -> None:
    described = describe_device("cpu", memory_bytes=1e8, threads=3)

    assert described.kind == "cpu"
    assert described.name
    assert described.memory_bytes == 1e8
    assert {"logical_cores", "memory_total_bytes"} <= described.facts.keys()
    assert described.facts["threads"] == 3
    assert msgspec.json.decode(msgspec.json.encode(described), type=Device) == described


def test_all_of_the_memory_is_the_default_budget() -> None:
    described = describe_device("cpu")
    assert described.memory_bytes == described.facts["memory_total_bytes"]


@pytest.mark.parametrize("memory_bytes", [0.0, -1.0, 1e18, float("nan")])
def test_a_budget_beyond_the_device_is_refused(memory_bytes: float) -> None:
    with pytest.raises(InputError, match=r"--memory .*cpu has"):
        describe_device("cpu", memory_bytes=memory_bytes)


@pytest.mark.parametrize("word", ["gpu", "cuda:", "cuda:x", "", "cpu:0"])
def test_an_unknown_device_is_refused(word: str) -> None:
    with pytest.raises(InputError, match="need cpu or cuda:N"):
        describe_device(word)


def test_cuda_without_a_cuda_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="sees no CUDA device"):
        describe_device("cuda:0")


def test_cuda_index_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(InputError, match=r"cuda:1: torch sees 1"):
        describe_device("cuda:1")


def test_cuda_joins_torch_and_nvml_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="Example GPU", uuid="aaaa", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties)
    monkeypatch.setattr(device, "_load_nvml", FakeNvml)

    described = describe_device("cuda", memory_bytes=2e10)

    assert (described.kind, described.name, described.memory_bytes) == ("cuda", "Example GPU", 2e10)
    assert described.facts["compute_capability"] == "9.0"
    assert described.facts["driver"] == "570.1"
    assert msgspec.json.decode(msgspec.json.encode(described), type=Device) == described
    assert torch_cuda_facts(properties).items() <= described.facts.items()


def test_an_agent_that_runs_for_long_tells_the_drivers_current_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hot(FakeNvml):
        def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:  # noqa: N802
            return 64

    monkeypatch.setattr(device, "_load_nvml", Hot)
    then = Device(kind="cuda", name="X", memory_bytes=1e9, facts={"uuid": "aaaa", "throttle_reasons": "none", "a": 1.0})
    now = with_current_facts(then)

    assert (now.facts["throttle_reasons"], now.facts["a"]) == ("HwThermalSlowdown", 1.0)
    emulated = msgspec.structs.replace(then, facts={"a": 1.0})
    assert with_current_facts(emulated) == emulated


def test_nvml_facts_are_in_base_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "PCI_DEVICES", tmp_path)
    nvml = FakeNvml()

    facts = nvml_facts("aaaa", load_nvml=lambda: nvml)

    assert facts["power_limit_w"] == 700.0
    assert facts["sm_max_frequency_hz"] == 1.98e9
    assert facts["cuda_driver"] == "12.8"
    assert (facts["ecc"], facts["mig"], facts["persistence"]) == ("on", "off", "on")
    assert facts["throttle_reasons"] == "SwPowerCap"
    assert (facts["nvlinks"], facts["uncorrected_memory_errors"]) == (3, 2.0)
    assert NOT_READ not in facts
    assert (facts["numa_node"], facts["pcie_generation"]) == (1.0, 4.0)
    assert nvml.open == 0, "NVML was not shut down"


@pytest.mark.parametrize(
    ("said", "node"), [("0\n", 0.0), ("3\n", 3.0), ("-1\n", 1.0), (None, 1.0)], ids=["0", "3", "unknown", "no file"]
)
def test_the_numa_node_is_that_of_the_pci_device_and_else_nvmls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, node: float
) -> None:
    monkeypatch.setattr(device, "PCI_DEVICES", tmp_path)

    class Attached(FakeNvml):
        def nvmlDeviceGetPciInfo(self, handle: str) -> Any:  # noqa: N802
            return SimpleNamespace(busId="00000000:C1:00.0")

    if said is not None:
        (tmp_path / "0000:c1:00.0").mkdir()
        (tmp_path / "0000:c1:00.0" / "numa_node").write_text(said)

    assert nvml_facts("aaaa", load_nvml=Attached)["numa_node"] == node


def test_a_fact_that_the_device_does_not_support_is_left_out() -> None:
    facts = nvml_facts("bbbb", load_nvml=FakeNvml)
    assert "power_limit_w" not in facts
    assert facts["pcie_max_width"] == 16.0


def test_an_odd_answer_of_the_driver_costs_that_fact_alone_and_is_named() -> None:
    class Odd(FakeNvml):
        def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
            return b"\xff".decode()

        def nvmlDeviceGetPowerManagementDefaultLimit(self, handle: str) -> int:  # noqa: N802
            return 2**32 - 1

        def __getattr__(self, name: str) -> Any:
            if name == "nvmlDeviceGetMigMode":
                raise AttributeError(name)
            return super().__getattr__(name)

    usual, odd = (nvml_facts("aaaa", load_nvml=kind) for kind in (FakeNvml, Odd))

    lost = {"nvml_name", "power_limit_default_w", "mig"}
    assert odd.keys() == (usual.keys() - lost) | {NOT_READ}
    assert {part.split(" ")[0] for part in str(odd[NOT_READ]).split("; ")} == lost
    assert "UnicodeDecodeError" in str(odd[NOT_READ])


def test_a_driver_library_that_cannot_start_costs_no_more_than_its_facts() -> None:
    class Broken(FakeNvml):
        def nvmlInit(self) -> None:  # noqa: N802
            raise OSError("libnvidia-ml.so: version mismatch")

    assert nvml_facts("aaaa", load_nvml=Broken) == {"nvml": "not available: libnvidia-ml.so: version mismatch"}


@pytest.mark.parametrize("lacks", ["nvmlDeviceGetHandleByUUID", "nvmlShutdown"])
def test_a_function_that_the_driver_lacks_ends_nothing(lacks: str) -> None:
    class Old(FakeNvml):
        pass

    def missing(*_: object) -> None:
        raise AttributeError(lacks)

    setattr(Old, lacks, missing)
    facts = nvml_facts("1234", load_nvml=Old)
    assert facts.keys() == ({"nvml"} if "UUID" in lacks else nvml_facts("1234", load_nvml=FakeNvml).keys())


def test_the_drivers_versions_are_read_without_a_device() -> None:
    assert driver_facts(load_nvml=FakeNvml) == {"driver": "570.1", "cuda_driver": "12.8"}


def test_a_uuid_that_nvml_does_not_know_gives_no_facts() -> None:
    nvml = FakeNvml()
    assert nvml_facts("cccc", load_nvml=lambda: nvml) == {"nvml": "knows no device with UUID cccc"}
    assert nvml.open == 0


def test_without_a_driver_the_record_says_so() -> None:
    facts = nvml_facts("aaaa", load_nvml=lambda: FakeNvml(driver_loaded=False))
    assert facts == {"nvml": "not available: Driver Not Loaded"}


def test_without_the_library_the_record_says_so() -> None:
    def missing() -> Any:
        raise ImportError("No module named 'pynvml'")

    assert nvml_facts("aaaa", load_nvml=missing) == {"nvml": "not asked: nvidia-ml-py is not installed"}


def test_the_real_library_has_every_name_that_is_asked_for() -> None:
    import pynvml

    codes = [getattr(device, name).__code__ for name in ("_numa_node", "_active_nvlinks")]
    for questions in (device._driver_questions, device._device_questions):
        codes += [code for code in questions.__code__.co_consts if hasattr(code, "co_names")]
    asked = [name for code in codes for name in code.co_names if name.lower().startswith("nvml")]

    asked += [f"nvmlClocksThrottleReason{name}" for name in (*disturbance.PASSING_REASONS, *disturbance.SETTINGS)]
    assert len(asked) >= 26
    assert [name for name in asked if not hasattr(pynvml, name)] == []


@pytest.mark.cuda
def test_nvml_knows_the_device_that_torch_sees() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    facts = describe_device("cuda:0").facts
    assert "driver" in facts, facts.get("nvml")


def facts_of_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpuinfo: str) -> tuple[str, Facts]:
    (tmp_path / "cpuinfo").write_bytes(cpuinfo.encode("latin-1"))
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.processor", lambda: "")
    return cpu_facts()


def test_x86_cpuinfo_gives_name_cores_and_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    virtual = X86.replace("cpu MHz", "flags\t: fpu avx2 hypervisor\nmicrocode\t: 0x1\ncpu MHz", 1)
    name, facts = facts_of_cpu(monkeypatch, tmp_path, virtual)
    assert name == "Example CPU 9000 @ 2.0GHz"
    assert (facts["physical_cores"], facts["frequency_hz"]) == (2.0, 2.5e9)
    assert (facts["virtual_machine"], facts["microcode"], facts["instruction_set"]) == ("yes", "0x1", "avx2")


def test_cpuinfo_without_those_fields_gives_no_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for text in (ARM, ""):
        name, facts = facts_of_cpu(monkeypatch, tmp_path, text)
        assert name == facts["machine"]
        assert not {"physical_cores", "frequency_hz", "virtual_machine", "microcode", NOT_READ} & facts.keys()


def test_an_odd_cpuinfo_costs_one_fact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, facts = facts_of_cpu(monkeypatch, tmp_path, X86.replace("2500.000", "<unknown>").replace("Example", "Ex\xff"))
    assert name.endswith("CPU 9000 @ 2.0GHz")
    assert facts["physical_cores"] == 2.0
    assert str(facts[NOT_READ]).startswith("frequency_hz (ValueError")


def test_sysfs_gives_caches_and_numa_nodes(tmp_path: Path) -> None:
    for number, (level, kind, size) in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "many"), ("3", "Unified", "32768K")]
    ):
        index = tmp_path / "cpu" / "cpu0" / "cache" / f"index{number}"
        index.mkdir(parents=True)
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (index / name).write_text(text + "\n")
    (tmp_path / "node" / "node0").mkdir(parents=True)
    (tmp_path / "node" / "node1").mkdir()

    facts = read_facts(device.system_questions(tmp_path))

    assert (facts["cache_l1_bytes"], facts["cache_l3_bytes"], facts["numa_nodes"]) == (48 * 1024.0, 32 * 2**20, 2.0)
    assert "cache_l2_bytes (ValueError" in str(facts[NOT_READ])
    nothing = read_facts(device.system_questions(tmp_path / "nothing"))
    assert not {"cache_l1_bytes", "numa_nodes", "governor", "smt", NOT_READ} & nothing.keys()


def test_a_fact_that_is_impossible_is_named_and_left_out() -> None:
    facts = read_facts({"a": lambda: -1.0, "b": lambda: float("nan"), "c": lambda: 0.0, "d": lambda: None, "e": str})
    assert facts == {"c": 0.0, NOT_READ: "a (impossible value -1); b (impossible value nan)"}
    assert merged(facts, {"f": 1.0, NOT_READ: "g"})[NOT_READ] == f"{facts[NOT_READ]}; g"
