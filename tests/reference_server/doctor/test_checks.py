"""What the doctor makes of facts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from helixbench.reference_server.doctor.checks import examine, examine_clock, examine_together
from helixbench.reference_server.doctor.facts import GpuFacts, NodeFacts
from helixbench.reference_server.doctor.findings import Finding
from helixbench.reference_server.doctor.versions import is_within

HEALTHY_GPU = GpuFacts(
    name="H100",
    uuid="GPU-1",
    throttle_reasons=0x1,  # idle
    is_persistent=True,
    is_mig=False,
    is_ecc=True,
    uncorrected_errors=0,
    memory_used_bytes=1e9,
    memory_total_bytes=80e9,
    temperature_celsius=40.0,
    sm_frequency_hz=1.98e9,
    sm_max_frequency_hz=1.98e9,
)
HEALTHY = NodeFacts(
    host="node1",
    system="Linux",
    python="3.12.1",
    versions={"torch": "2.12.0+cu128", "transformers": "5.10.1", "pyzmq": "26.2"},
    requirements=('torch<2.14,>=2.11; extra == "serve"', 'transformers<6,>=5.10; extra == "serve"', "pyzmq>=26"),
    requires_python=">=3.11",
    has_nvidia_device=True,
    driver="570.86",
    driver_cuda="12.8",
    gpus=(HEALTHY_GPU,),
    torch_cuda="12.8",
    torch_sees_gpus=1,
    torch_uuids=("GPU-1",),
    iperf3="3.18",
    programs=("ip", "tc", "unshare"),
    cgroup_version=2,
    logical_cores=8,
    usable_cores=8.0,
    load=0.2,
    governors=("performance",),
    memory_available_bytes=64e9,
    disk_folder="/tmp",
    disk_free_bytes=500e9,
    max_open_files=65536,
    is_clock_synchronised=True,
)


def with_facts(**changes: Any) -> tuple[Finding, ...]:
    return examine(msgspec.structs.replace(HEALTHY, **changes))


def with_gpu(**changes: Any) -> tuple[Finding, ...]:
    return with_facts(gpus=(msgspec.structs.replace(HEALTHY_GPU, **changes),))


def not_ok(findings: tuple[Finding, ...]) -> list[tuple[str, str]]:
    return [(finding.check, finding.state) for finding in findings if finding.state != "ok"]


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert not_ok(examine(HEALTHY)) == []


@pytest.mark.parametrize(
    ("changes", "check", "state", "says", "remedy"),
    [
        ({"python": "3.10.4"}, "python", "problem", "3.10.4, need >=3.11", "Python"),
        (
            {"versions": {"transformers": "5.10", "pyzmq": "26"}},
            "torch",
            "problem",
            "not installed",
            "torch>=2.11,<2.14",
        ),
        (
            {"versions": {"torch": "2.14.0", "transformers": "5.10", "pyzmq": "26"}},
            "torch",
            "problem",
            "2.14.0, need >=2.11,<2.14",
            "pip install 'torch>=2.11,<2.14'",
        ),
        ({"torch_problem": "OSError: libcudart"}, "torch", "problem", "libcudart", "again"),
        ({"driver": None, "nvml_problem": "Driver Not Loaded"}, "driver", "problem", "Driver Not Loaded", "nvidia-smi"),
        ({"torch_cuda": None}, "torch CUDA", "problem", "without CUDA", "install torch"),
        ({"torch_cuda": "13.0"}, "torch CUDA", "problem", "13.0, the driver goes up to 12.8", "update the driver"),
        (
            {"torch_sees_gpus": 0, "visible_devices": ""},
            "torch CUDA",
            "problem",
            "sees no GPU; CUDA_VISIBLE_DEVICES is ''",
            "CUDA_VISIBLE_DEVICES",
        ),
        ({"iperf3": None}, "iperf3", "warning", "own transport", "install iperf3"),
        ({"iperf3": "3.1.3"}, "iperf3", "problem", "connect-timeout", "3.18"),
        ({"iperf3": "3.4"}, "iperf3", "problem", "too high", "3.18"),
        ({"iperf3": "3.9"}, "iperf3", "warning", "reverse", "3.18"),
        ({"iperf3": "3.17.1"}, "iperf3", "warning", "twice", "3.18"),
        ({"can_open_port": "Permission denied"}, "ports", "problem", "Permission denied", "sockets"),
        ({"why_no_testbed": "not root"}, "testbeds", "warning", "not root", "as root"),
        ({"why_no_testbed": "no tc", "programs": ("ip", "unshare")}, "testbeds", "warning", "no tc", "install tc"),
        ({"cgroup_version": None}, "cgroup", "warning", "emulated", "cgroup v2"),
        ({"governors": ("performance", "powersave")}, "cpu", "warning", "powersave", "cpupower"),
        ({"usable_cores": 1.5}, "cpu", "warning", "1.5 of 8 cores", "quota"),
        ({"load": 5.0}, "cpu", "warning", "load 5.0 on 8", "end it"),
        ({"memory_limit_bytes": 5e8}, "memory", "problem", "0.50 GB", "limit"),
        ({"disk_free_bytes": 5e8}, "disk", "problem", "0.5 GB free in /tmp", "TMPDIR"),
        ({"disk_free_bytes": 5e9}, "disk", "warning", "5.0 GB", "TMPDIR"),
        ({"max_open_files": 256}, "open files", "warning", "256", "ulimit -n"),
        ({"is_clock_synchronised": False}, "clock", "warning", "not synchronised", "chrony"),
    ],
)
def test_each_ill_is_found_alone_and_has_a_remedy(
    changes: dict[str, Any], check: str, state: str, says: str, remedy: str
) -> None:
    findings = with_facts(**changes)

    assert not_ok(findings) == [(check, state)]
    (found,) = [finding for finding in findings if finding.state != "ok"]
    assert says in found.says
    assert remedy in found.remedy
    assert "\n" not in found.remedy


@pytest.mark.parametrize(
    ("changes", "state", "says"),
    [
        ({"throttle_reasons": 0x04}, "warning", "power cap"),
        ({"throttle_reasons": 0x40}, "problem", "temperature (hardware) at 40 °C"),
        ({"throttle_reasons": 0x80}, "problem", "power brake"),
        ({"uncorrected_errors": 3}, "problem", "3 uncorrected"),
        ({"memory_used_bytes": 40e9}, "warning", "40.0 of 80.0 GB"),
        ({"is_persistent": False}, "warning", "persistence"),
        ({"is_mig": True}, "warning", "MIG"),
    ],
)
def test_each_ill_of_a_gpu_is_found(changes: dict[str, Any], state: str, says: str) -> None:
    findings = with_gpu(**changes)

    assert not_ok(findings) == [("gpu 0", state)]
    assert says in next(finding.says for finding in findings if finding.state != "ok")


def test_gpus_are_joined_with_torchs_devices_on_the_uuid() -> None:
    gpus = tuple(msgspec.structs.replace(HEALTHY_GPU, uuid=f"GPU-{number}") for number in range(3))
    hot = msgspec.structs.replace(gpus[2], throttle_reasons=0x40)
    findings = with_facts(gpus=(*gpus[:2], hot), torch_sees_gpus=2, torch_uuids=("GPU-2", "GPU-0"))

    says = {finding.check: finding.says for finding in findings if finding.check.startswith("gpu")}
    assert says["gpu 0"].startswith("H100 GPU-0 (cuda:1), 1980 of")
    assert says["gpu 1"].startswith("H100 GPU-1 (not seen by torch)")
    assert says["gpu 2"].startswith("H100 GPU-2 (cuda:0) is throttled")
    hidden = {finding.check: finding.says for finding in with_facts(torch_uuids=(), visible_devices="7")}
    assert "(not seen by torch: CUDA_VISIBLE_DEVICES is '7')" in hidden["gpu 0"]
    unknown = {finding.check: finding.says for finding in with_facts(torch_uuids=None)}
    assert unknown["gpu 0"].startswith("H100 GPU-1, 1980 of")


def test_a_newer_minor_cuda_of_torch_runs_on_the_driver() -> None:
    assert not_ok(with_facts(torch_cuda="12.9")) == []


def test_a_machine_without_nvidia_and_with_unknown_facts_is_no_problem() -> None:
    findings = with_facts(
        has_nvidia_device=False,
        driver=None,
        gpus=(),
        torch_cuda=None,
        governors=(),
        memory_available_bytes=None,
        max_open_files=None,
        is_clock_synchronised=None,
        load=None,
    )
    assert not_ok(findings) == []
    assert "no NVIDIA device; this node computes on CPU" in [finding.says for finding in findings]


@pytest.mark.parametrize(
    ("version", "wanted", "is_in"),
    [
        ("2.11", ">=2.11,<2.14", True),
        ("2.11.0+cpu", ">=2.11.0,<2.14", True),
        ("2.13.9", ">=2.11,<2.14", True),
        ("2.14", ">=2.11,<2.14.0", False),
        ("2.9", ">=2.11", False),
        ("26", "", True),
    ],
)
def test_versions_are_compared_by_number(version: str, wanted: str, is_in: bool) -> None:
    assert is_within(version, wanted) is is_in


@pytest.mark.parametrize(
    ("offset_s", "uncertainty_s", "state"),
    [(0.05, 0.001, "ok"), (-0.5, 0.001, "warning"), (0.5, 0.6, "ok"), (-3600.0, 0.1, "problem")],
)
def test_a_clock_is_off_where_the_offset_is_beyond_its_uncertainty(
    offset_s: float, uncertainty_s: float, state: str
) -> None:
    assert examine_clock(offset_s, uncertainty_s).state == state


def test_versions_that_differ_between_nodes_are_named() -> None:
    other = msgspec.structs.replace(HEALTHY, versions=HEALTHY.versions | {"torch": "2.11.0"})

    torch, transformers = examine_together({"a": HEALTHY, "b": other, "c": HEALTHY})

    assert (torch.state, torch.says) == ("warning", "2.11.0 on b; 2.12.0+cu128 on a, c")
    assert transformers.state == "ok"
