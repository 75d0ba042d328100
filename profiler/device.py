"""Describe a device with facts from torch, the driver (NVML) and the operating system, beside what is measured.

Each fact is read by itself: one that is not stated is left out, and one that cannot be read is left out and named
under ``not_read``, so an odd driver or container costs one fact and never the rest.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import Device

Fact = str | float
Facts = dict[str, Fact]
NOT_READ = "not_read"

CPUINFO = Path("/proc/cpuinfo")
SYSTEM_DEVICES = Path("/sys/devices/system")
PCI_DEVICES = Path("/sys/bus/pci/devices")
CPU_NAME_FIELDS = ("model name", "Hardware", "cpu model", "cpu")  # x86, old ARM, MIPS, POWER
INSTRUCTION_SETS = ("avx512f", "avx2", "avx")  # flags of x86 for vector instructions, widest first
NVML_NOT_AVAILABLE = frozenset({2**32 - 1, 2**64 - 1})  # returned as a count where the driver has none


def read_facts(
    questions: Mapping[str, Callable[[], Fact | None]], *, unsupported: tuple[type[Exception], ...] = ()
) -> Facts:
    """Ask each question by itself: name -> answer.

    Args:
        questions: name -> a function that returns the fact, or ``None`` where it is not stated.
        unsupported: exceptions that mean "not stated".
    """
    facts: Facts = {}
    not_read = []
    for name, ask in questions.items():
        try:
            value = ask()
        except unsupported:
            continue
        except Exception as error:  # drivers and containers fail in ways that nobody has listed
            not_read.append(f"{name} ({type(error).__name__}: {error})")
            continue
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            not_read.append(f"{name} (impossible value {value:g})")
        elif value is not None and value != "":
            facts[name] = value
    return facts | ({NOT_READ: "; ".join(not_read)} if not_read else {})


def merged(*parts: Facts) -> Facts:
    """Several sources as one, ``not_read`` joined."""
    not_read = [str(part[NOT_READ]) for part in parts if NOT_READ in part]
    facts = {name: fact for part in parts for name, fact in part.items() if name != NOT_READ}
    return facts | ({NOT_READ: "; ".join(not_read)} if not_read else {})


def describe_device(device: str, *, memory_bytes: float | None = None, threads: int | None = None) -> Device:
    """Describe ``"cpu"`` or ``"cuda:N"`` as the driver and the operating system know it; only the latter asks torch.

    Args:
        device: as torch names it; ``"cuda"`` is ``"cuda:0"``.
        memory_bytes: budget for weights, workspace and KV cache together; all of the device's memory by default.
        threads: that compute on ``"cpu"``, where that is known.

    Raises:
        InputError: an unknown name, a device that this machine does not have, or more memory than it has.
    """
    if device == "cpu":
        total_bytes = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        name, facts = cpu_facts()
        if threads is not None:
            facts["threads"] = float(threads)
        return Device(kind="cpu", name=name, memory_bytes=_budget(device, memory_bytes, total_bytes), facts=facts)
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise InputError(f"--device {device}: need cpu or cuda:N")
    properties = _cuda_properties(device, int(match[1] or 0))
    facts = merged(torch_cuda_facts(properties), nvml_facts(str(properties.uuid), load_nvml=_load_nvml))
    budget = _budget(device, memory_bytes, float(properties.total_memory))
    return Device(kind="cuda", name=properties.name, memory_bytes=budget, facts=facts)


def with_current_facts(device: Device) -> Device:
    """The device with the driver's facts (clocks, throttling, memory in use) read again; only a GPU has them."""
    if "uuid" not in device.facts:
        return device
    current = nvml_facts(str(device.facts["uuid"]), load_nvml=_load_nvml)
    return msgspec.structs.replace(device, facts=device.facts | current)


def _budget(device: str, asked_bytes: float | None, total_bytes: float) -> float:
    if asked_bytes is None:
        return total_bytes
    if not 0 < asked_bytes <= total_bytes:
        raise InputError(
            f"--memory {asked_bytes / 1e9:g}GB: {device} has {total_bytes / 1e9:.1f}GB; ask for more than 0 and no more"
        )
    return asked_bytes


def cpu_facts() -> tuple[str, Facts]:
    """The processor's name, and its cores, clock, caches and memory."""
    blocks = parse_cpuinfo(first_text(CPUINFO))
    name = next((block[field] for field in CPU_NAME_FIELDS for block in blocks if block.get(field)), "")
    facts = read_facts(_cpuinfo_questions(blocks) | system_questions())
    return name or platform.processor() or platform.machine() or "unknown CPU", facts


def parse_cpuinfo(text: str) -> list[dict[str, str]]:
    """One mapping per logical processor of ``/proc/cpuinfo``."""
    return [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        for block in text.split("\n\n")
        if block.strip()
    ]


def _cpuinfo_questions(blocks: list[dict[str, str]]) -> dict[str, Callable[[], Fact | None]]:
    first = blocks[0] if blocks else {}
    flags = first.get("flags", "").split()
    cores = {(block["physical id"], block["core id"]) for block in blocks if {"physical id", "core id"} <= block.keys()}
    return {
        "physical_cores": lambda: float(len(cores)) or None,
        "microcode": lambda: first.get("microcode"),
        "virtual_machine": lambda: "yes" if "hypervisor" in flags else None,
        "instruction_set": lambda: next(
            (name for name in INSTRUCTION_SETS if name in first.get("flags", "").split()), None
        ),
        "frequency_hz": lambda: float(first["cpu MHz"]) * 1e6 if "cpu MHz" in first else None,
    }


def system_questions(root: Path = SYSTEM_DEVICES) -> dict[str, Callable[[], Fact | None]]:
    """Questions about cores, caches, memory and kernel; Linux counts devices below ``root``."""
    frequency = root / "cpu" / "cpu0" / "cpufreq"
    return {
        "machine": platform.machine,
        "kernel": platform.release,
        "logical_cores": lambda: float(os.cpu_count() or 1),
        "usable_cores": lambda: float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else None,
        "memory_total_bytes": lambda: float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "max_frequency_hz": lambda: _scaled(first_line(frequency / "cpuinfo_max_freq"), 1e3),
        "governor": lambda: first_line(frequency / "scaling_governor"),
        "smt": lambda: {"": None, "0": "off", "1": "on"}[first_line(root / "cpu" / "smt" / "active")],
        "numa_nodes": lambda: float(len(list((root / "node").glob("node[0-9]*")))) or None,
        **{f"cache_l{level}_bytes": functools.partial(_cache_bytes, root, str(level)) for level in (1, 2, 3, 4)},
    }


def _cache_bytes(root: Path, level: str) -> float | None:
    """Size of cpu0's data or unified cache of that level."""
    for index in (root / "cpu" / "cpu0" / "cache").glob("index*"):
        if first_line(index / "level") == level and first_line(index / "type") != "Instruction":
            return _scaled(first_line(index / "size").removesuffix("K"), 1024)
    return None


def _scaled(text: str, factor: float) -> float | None:
    return float(text) * factor if text else None


def first_text(path: Path) -> str:
    """Text of a file of the system; empty where there is none that this process may read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def first_line(path: Path) -> str:
    """First line of a file of the system; empty where there is none that this process may read."""
    return first_text(path).partition("\n")[0].strip()


def _cuda_properties(device: str, index: int) -> Any:
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch {torch.__version__} sees no CUDA device here; use cpu")
    if index >= torch.cuda.device_count():
        raise InputError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA device(s), counted from 0")
    return torch.cuda.get_device_properties(index)


def torch_cuda_facts(properties: Any) -> Facts:
    """Facts from ``torch.cuda.get_device_properties``, and the CUDA version that torch was built for."""
    import torch

    return read_facts(
        {
            "torch_cuda": lambda: torch.version.cuda,
            "uuid": lambda: str(properties.uuid),
            "compute_capability": lambda: f"{properties.major}.{properties.minor}",
            "multiprocessors": lambda: float(properties.multi_processor_count),
            "memory_total_bytes": lambda: float(properties.total_memory),
        }
    )


def _load_nvml() -> Any:
    import pynvml  # the module of the distribution nvidia-ml-py

    return pynvml


def nvml_facts(uuid: str, *, load_nvml: Callable[[], Any]) -> Facts:
    """Facts from the driver about the device of that UUID.

    CUDA and NVML number devices differently (``CUDA_VISIBLE_DEVICES``, fastest first), so they are joined on the UUID.

    Args:
        uuid: torch's, without the ``GPU-`` that NVML puts before it.
        load_nvml: imports ``pynvml``; may raise ``ImportError``.

    Returns:
        The facts that this device supports; or ``"nvml"`` alone, the reason why there are none.
    """

    def of_device(nvml: Any) -> Facts:
        handle = handle_by_uuid(nvml, uuid)
        if handle is None:
            return {"nvml": f"knows no device with UUID {uuid}"}
        questions = _driver_questions(nvml) | _device_questions(nvml, handle)
        return read_facts(questions, unsupported=(nvml.NVMLError,))

    return _with_nvml(of_device, load_nvml)


def driver_facts(*, load_nvml: Callable[[], Any] | None = None) -> Facts:
    """Versions of the NVIDIA driver, for a machine whose devices torch does not see; or ``"nvml"``, why not."""
    return _with_nvml(
        lambda nvml: read_facts(_driver_questions(nvml), unsupported=(nvml.NVMLError,)), load_nvml or _load_nvml
    )


def _with_nvml(ask: Callable[[Any], Facts], load_nvml: Callable[[], Any]) -> Facts:
    try:
        nvml = load_nvml()
    except ImportError:
        return {"nvml": "not asked: nvidia-ml-py is not installed"}
    try:
        nvml.nvmlInit()
    except Exception as error:  # NVMLError, or a library that does not fit its driver
        return {"nvml": f"not available: {error}"}
    try:
        return ask(nvml)
    finally:
        with contextlib.suppress(Exception):  # what was read does not depend on it
            nvml.nvmlShutdown()


def open_nvml() -> Any | None:
    """``pynvml``, initialised for the rest of the process; ``None`` where it or the driver is missing."""
    try:
        nvml = _load_nvml()
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except Exception:  # NVMLError, or a library that does not fit its driver
        return None
    return nvml


def handle_by_uuid(nvml: Any, uuid: str) -> Any | None:
    """NVML's handle of the device with torch's UUID; ``None`` where there is none."""
    for prefix in ("GPU-", "MIG-"):
        with contextlib.suppress(Exception):  # NVMLError, or a function that the driver lacks
            return nvml.nvmlDeviceGetHandleByUUID(prefix + uuid)
    return None


def _driver_questions(nvml: Any) -> dict[str, Callable[[], Fact | None]]:
    return {
        "driver": lambda: str(nvml.nvmlSystemGetDriverVersion()),
        "cuda_driver": lambda: _cuda_version(nvml.nvmlSystemGetCudaDriverVersion_v2()),
    }


def _device_questions(nvml: Any, handle: Any) -> dict[str, Callable[[], Fact | None]]:
    """Clocks in Hz, power in W, memory in bytes; PCIe generation and width as the driver counts them."""
    return {
        "nvml_name": lambda: str(nvml.nvmlDeviceGetName(handle)),
        "pci_bus": lambda: str(nvml.nvmlDeviceGetPciInfo(handle).busId),
        "pcie_max_generation": lambda: _count(nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
        "pcie_max_width": lambda: _count(nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
        "sm_max_frequency_hz": lambda: _count(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)) * 1e6,
        "sm_frequency_hz": lambda: _count(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)) * 1e6,
        "memory_max_frequency_hz": lambda: _count(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)) * 1e6,
        "power_limit_w": lambda: _count(nvml.nvmlDeviceGetEnforcedPowerLimit(handle)) / 1e3,
        "temperature_celsius": lambda: _count(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        "nvml_memory_used_bytes": lambda: _count(nvml.nvmlDeviceGetMemoryInfo(handle).used),
        "power_limit_default_w": lambda: _count(nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle)) / 1e3,
        "sm_application_frequency_hz": lambda: (
            _count(nvml.nvmlDeviceGetApplicationsClock(handle, nvml.NVML_CLOCK_SM)) * 1e6
        ),
        "ecc": lambda: _on_off(nvml.nvmlDeviceGetEccMode(handle)[0]),
        "uncorrected_memory_errors": lambda: _count(
            nvml.nvmlDeviceGetTotalEccErrors(handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
        ),
        "mig": lambda: _on_off(nvml.nvmlDeviceGetMigMode(handle)[0]),
        "persistence": lambda: _on_off(nvml.nvmlDeviceGetPersistenceMode(handle)),
        "pcie_generation": lambda: _count(nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)),
        "pcie_width": lambda: _count(nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
        "numa_node": lambda: _numa_node(nvml, handle),
        "throttle_reasons": lambda: _throttle_reasons(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        "nvlinks": lambda: _active_nvlinks(nvml, handle),
    }


def _count(value: int) -> float:
    """A count of NVML's.

    Raises:
        ValueError: the value that stands for "not available".
    """
    if value in NVML_NOT_AVAILABLE:
        raise ValueError("not available")
    return float(value)


def _numa_node(nvml: Any, handle: Any) -> float:
    """NUMA node of the PCI device; NVML's own answer is about devices whose memory is a NUMA node itself."""
    attached = numa_node_of_pci(str(nvml.nvmlDeviceGetPciInfo(handle).busId), PCI_DEVICES)
    return _count(nvml.nvmlDeviceGetNumaNodeId(handle)) if attached is None else attached


def numa_node_of_pci(bus: str, devices: Path) -> float | None:
    """NUMA node of a PCI device as Linux knows it; ``None`` where it does not (-1).

    Args:
        bus: ``domain:bus:device.function`` in hexadecimal; NVML's domain has eight digits, Linux' has four.
        devices: the folder of all PCI devices.
    """
    domain, _, rest = bus.lower().partition(":")
    try:
        node = int(first_line(devices / f"{int(domain, 16):04x}:{rest}" / "numa_node"))
    except ValueError:
        return None
    return float(node) if node >= 0 else None


def _active_nvlinks(nvml: Any, handle: Any) -> float:
    """Number of NVLinks that are up."""
    active = 0
    for link in range(int(nvml.NVML_NVLINK_MAX_LINKS)):
        try:
            active += int(nvml.nvmlDeviceGetNvLinkState(handle, link) == nvml.NVML_FEATURE_ENABLED)
        except nvml.NVMLError:
            break  # a number beyond the device's links
    return float(active)


def _throttle_reasons(nvml: Any, bits: int) -> str:
    prefix = "nvmlClocksThrottleReason"
    reasons = {name.removeprefix(prefix): getattr(nvml, name) for name in dir(nvml) if name.startswith(prefix)}
    single = {name: bit for name, bit in reasons.items() if isinstance(bit, int) and bit.bit_count() == 1}
    return ", ".join(sorted(name for name, bit in single.items() if bits & bit)) or "none"


def _on_off(value: int) -> str:
    return "on" if value else "off"


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
