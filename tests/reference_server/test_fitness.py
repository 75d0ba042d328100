"""Findings from a node's description of itself."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from helixbench.profiler.cluster import Device
from helixbench.profiler.device import NOT_READ, Facts
from helixbench.reference_server.fitness import Finding, NodeFacts, examine, examine_together

GPU_FACTS: Facts = {
    "uuid": "1",
    "driver": "570.86",
    "cuda_driver": "12.8",
    "throttle_reasons": "GpuIdle",
    "persistence": "on",
    "mig": "off",
    "ecc": "on",
    "uncorrected_memory_errors": 0.0,
    "nvml_memory_used_bytes": 1e9,
    "memory_total_bytes": 80e9,
    "temperature_celsius": 40.0,
}
MACHINE: Facts = {
    "host": "node1",
    "iperf3": "3.18",
    "logical_cores": 8.0,
    "usable_cores": 8.0,
    "governor": "performance",
    "load_1min": 0.2,
    "memory_available_bytes": 64e9,
    "temporary_folder": "/tmp",
    "disk_free_bytes": 500e9,
    "max_open_files": 65536.0,
    "clock_synchronised": "yes",
}
HEALTHY = NodeFacts(
    devices=(Device(kind="cuda", name="H100", memory_bytes=80e9, facts=GPU_FACTS),),
    versions={"python": "3.12.1", "torch": "2.12.0+cu128", "transformers": "5.10.1", "pyzmq": "26.2"},
    machine=MACHINE,
)


def with_machine(**changes: Any) -> tuple[Finding, ...]:
    return examine(msgspec.structs.replace(HEALTHY, machine=MACHINE | changes))


def with_versions(**changes: str) -> tuple[Finding, ...]:
    return examine(msgspec.structs.replace(HEALTHY, versions=HEALTHY.versions | changes))


def with_gpu(**changes: Any) -> tuple[Finding, ...]:
    device = msgspec.structs.replace(HEALTHY.devices[0], facts=GPU_FACTS | changes)
    return examine(msgspec.structs.replace(HEALTHY, devices=(device,)))


def not_ok(findings: tuple[Finding, ...]) -> list[tuple[str, str]]:
    return [(finding.check, finding.state) for finding in findings if finding.state != "ok"]


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert not_ok(examine(HEALTHY)) == []


@pytest.mark.parametrize(
    ("findings", "check", "state", "says", "remedy"),
    [
        (with_versions(python="3.10.4"), "python", "problem", "3.10.4, need >=3.11", "Python"),
        (with_versions(torch="2.14.0"), "torch", "problem", "2.14.0, need <2.14,>=2.11", "pip install 'torch<2.14,"),
        (with_machine(iperf3=""), "iperf3", "warning", "own transport", "install iperf3"),
        (with_machine(iperf3="3.1.3"), "iperf3", "problem", "connect-timeout", "3.18"),
        (with_machine(iperf3="3.4"), "iperf3", "problem", "too high", "3.18"),
        (with_machine(iperf3="3.9"), "iperf3", "warning", "reverse", "3.18"),
        (with_machine(iperf3="3.17.1"), "iperf3", "warning", "threads", "3.18"),
        (with_machine(iperf3="of an unknown version"), "iperf3", "warning", "not understood", "3.18"),
        (with_machine(governor="powersave"), "governor", "warning", "powersave", "cpupower"),
        (with_machine(cpu_quota_cores=1.5), "cores", "warning", "1.5 of 8 cores", "quota"),
        (with_machine(usable_cores=2.0), "cores", "warning", "2 of 8 cores", "affinity"),
        (with_machine(load_1min=5.0), "load", "warning", "5.0 on 8", "end what else runs"),
        (with_machine(memory_limit_bytes=5e8), "memory", "problem", "0.50 GB", "limit"),
        (with_machine(disk_free_bytes=5e8), "disk", "problem", "0.5 GB free in /tmp", "TMPDIR"),
        (with_machine(disk_free_bytes=5e9), "disk", "warning", "5.0 GB", "TMPDIR"),
        (with_machine(max_open_files=256.0), "open files", "warning", "256", "ulimit -n"),
        (with_machine(clock_synchronised="no"), "clock", "warning", "not synchronised", "chrony"),
        (with_machine(**{NOT_READ: "smt (KeyError)"}), "facts", "warning", "smt (KeyError)", "report"),
        (with_gpu(throttle_reasons="GpuIdle, SwPowerCap"), "gpu 1", "warning", "power cap", "cooling"),
        (with_gpu(throttle_reasons="HwThermalSlowdown"), "gpu 1", "problem", "(hardware) at 40 °C", "cooling"),
        (with_gpu(throttle_reasons="HwPowerBrakeSlowdown"), "gpu 1", "problem", "power brake", "power supply"),
        (with_gpu(uncorrected_memory_errors=3.0), "gpu 1", "problem", "3 uncorrected", "reset"),
        (with_gpu(nvml_memory_used_bytes=40e9), "gpu 1", "warning", "40.0 of 80.0 GB", "nvidia-smi"),
        (with_gpu(persistence="off"), "gpu 1", "warning", "persistence", "nvidia-persistenced"),
        (with_gpu(mig="on"), "gpu 1", "warning", "MIG", "MIG-UUID"),
        (with_gpu(**{NOT_READ: "ecc (x)"}), "facts", "warning", "ecc (x)", "report"),
    ],
)
def test_each_ill_is_found_alone_and_has_a_remedy(
    findings: tuple[Finding, ...], check: str, state: str, says: str, remedy: str
) -> None:
    assert not_ok(findings) == [(check, state)]
    (found,) = [finding for finding in findings if finding.state != "ok"]
    assert says in found.says
    assert remedy in found.remedy
    assert "\n" not in found.remedy


def test_a_missing_library_and_a_gpu_without_its_driver_are_problems() -> None:
    versions = {name: version for name, version in HEALTHY.versions.items() if name != "torch"}
    device = msgspec.structs.replace(HEALTHY.devices[0], facts={"nvml": "not available: Driver Not Loaded"})
    findings = examine(NodeFacts((device,), versions, MACHINE))

    assert not_ok(findings) == [("torch", "problem"), ("gpu", "problem")]
    says = [finding.says for finding in findings if finding.state == "problem"]
    assert says == ["not installed", "H100: NVML not available: Driver Not Loaded"]


def test_a_machine_that_states_nothing_has_no_problem() -> None:
    device = Device(kind="cpu", name="CPU", memory_bytes=1e9)
    assert not_ok(examine(NodeFacts((device,), HEALTHY.versions, {}))) == [("iperf3", "warning")]


def test_versions_that_differ_between_nodes_are_named() -> None:
    other = msgspec.structs.replace(HEALTHY, versions=HEALTHY.versions | {"torch": "2.11.0"})

    torch, transformers = examine_together({"a": HEALTHY, "b": other, "c": HEALTHY})

    assert (torch.state, torch.says) == ("warning", "2.11.0 on b; 2.12.0+cu128 on a, c")
    assert (transformers.state, transformers.remedy) == ("ok", "")
    assert re.fullmatch(r"5\.10\.1 on a, b, c", transformers.says)
