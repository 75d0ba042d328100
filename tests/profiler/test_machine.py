from __future__ import annotations

from pathlib import Path

import pytest

from helixbench.profiler import machine
from helixbench.profiler.device import NOT_READ
from helixbench.profiler.machine import available_bytes, cpu_quota_cores, library_versions, machine_facts


def test_this_machine_states_its_facts() -> None:
    facts = machine_facts()

    assert {"host", "logical_cores", "load_1min", "disk_free_bytes", "memory_available_bytes"} <= facts.keys()
    assert NOT_READ not in facts
    assert {"python", "torch", "helixbench"} <= library_versions().keys()


def test_a_source_that_fails_costs_its_fact_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("iperf3: Exec format error")

    usual = machine_facts()
    monkeypatch.setattr(machine, "_iperf3_version", fail)
    odd = machine_facts()

    assert odd.keys() - usual.keys() == {NOT_READ}
    assert odd[NOT_READ] == "iperf3 (RuntimeError: iperf3: Exec format error)"


def test_available_memory_is_read_from_meminfo() -> None:
    assert available_bytes("MemTotal: 9 kB\nMemAvailable:   2 kB\nHugePages: 3\n") == 2048
    assert available_bytes("") is None


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_cpu_quota_is_read(tmp_path: Path, files: dict[str, str], cores: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota_cores(tmp_path) == cores
