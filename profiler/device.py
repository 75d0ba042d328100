"""What the driver (NVML) and the operating system say about a device: facts beside what is measured, not instead of it.

A fact that nobody states is left out of the record; where a whole source is missing, the record says which and why.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helixbench.errors import InputError
from helixbench.profiler.cluster import Device

Facts = dict[str, str | float]

CPUINFO = Path("/proc/cpuinfo")
MAX_FREQUENCY_KHZ = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
SYSTEM_DEVICES = Path("/sys/devices/system")
PCI_DEVICES = Path("/sys/bus/pci/devices")
CPU_NAME_FIELDS = ("model name", "Hardware", "cpu model", "cpu")  # x86, old ARM, MIPS, POWER


def describe_device(device: str, *, memory_bytes: float | None = None, cpu_share: float | None = None) -> Device:
    """Facts of ``"cpu"`` or ``"cuda:N"``.

    Args:
        device: as torch names it; ``"cuda"`` is ``"cuda:0"``.
        memory_bytes: what weights, workspace and KV cache may use together; all of the device's memory by default.
        cpu_share: of a processor, that a node on ``"cpu"`` is held back to; ``None`` where it is not.

    Raises:
        InputError: another word, a device that this machine does not have, or more memory than it has.
    """
    if device == "cpu":
        total_bytes = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        name, facts = cpu_facts()
        facts["cpu_share"] = "none" if cpu_share is None else cpu_share
        return Device(kind="cpu", name=name, memory_bytes=_budget(device, memory_bytes, total_bytes), facts=facts)
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise InputError(f"--device {device!r}: need cpu or cuda:N")
    properties = _cuda_properties(device, int(match[1] or 0))
    facts = torch_cuda_facts(properties) | nvml_facts(str(properties.uuid), load_nvml=_load_nvml)
    budget = _budget(device, memory_bytes, float(properties.total_memory))
    return Device(kind="cuda", name=properties.name, memory_bytes=budget, facts=facts)


def _budget(device: str, asked_bytes: float | None, total_bytes: float) -> float:
    if asked_bytes is None:
        return total_bytes
    if not 0 < asked_bytes <= total_bytes:
        raise InputError(
            f"--memory {asked_bytes / 1e9:g}GB: {device} has {total_bytes / 1e9:.1f}GB; ask for more than 0 and no more"
        )
    return asked_bytes


def cpu_facts() -> tuple[str, Facts]:
    """The processor's name, and cores, clock and what torch makes of them."""
    import torch

    text = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else ""
    name, facts = parse_cpuinfo(text)
    facts["machine"] = platform.machine()
    facts["logical_cores"] = float(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        facts["usable_cores"] = float(len(os.sched_getaffinity(0)))
    if MAX_FREQUENCY_KHZ.exists():
        facts["max_frequency_hz"] = float(MAX_FREQUENCY_KHZ.read_text()) * 1e3
    facts |= _sysfs_facts(SYSTEM_DEVICES)
    facts["kernel"] = platform.release()
    facts["memory_total_bytes"] = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    facts["torch_threads"] = float(torch.get_num_threads())
    facts["torch_instruction_set"] = torch.backends.cpu.get_cpu_capability()
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    if blas is not None:
        facts["torch_blas"] = blas[1]
    return name or platform.processor() or platform.machine() or "unknown CPU", facts


def parse_cpuinfo(text: str) -> tuple[str, Facts]:
    """Name, physical cores and clock of the first processor out of the text of ``/proc/cpuinfo``.

    The name is empty and a fact is absent where the text does not say.
    """
    blocks = [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        for block in text.split("\n\n")
        if block.strip()
    ]
    facts: Facts = {}
    name = next((block[field] for field in CPU_NAME_FIELDS for block in blocks if block.get(field)), "")
    cores = {(block["physical id"], block["core id"]) for block in blocks if {"physical id", "core id"} <= block.keys()}
    if cores:
        facts["physical_cores"] = float(len(cores))
    clocks = [block["cpu MHz"] for block in blocks if "cpu MHz" in block]
    if blocks and blocks[0].get("microcode"):
        facts["microcode"] = blocks[0]["microcode"]
    if blocks and "hypervisor" in blocks[0].get("flags", "").split():
        facts["virtual_machine"] = "yes"
    if clocks:
        facts["frequency_hz"] = float(clocks[0]) * 1e6
    return name, facts


def _sysfs_facts(root: Path) -> Facts:
    """Caches, NUMA nodes, governor and mitigations as Linux counts them; those that it does not show are left out."""
    facts: Facts = {}
    for index in sorted((root / "cpu" / "cpu0" / "cache").glob("index*")):
        level, kind, size = (_first_line(index / name) for name in ("level", "type", "size"))
        if level and size.endswith("K") and kind != "Instruction":
            facts[f"cache_l{level}_bytes"] = float(size[:-1]) * 1024
    numa = list((root / "node").glob("node[0-9]*"))
    if numa:
        facts["numa_nodes"] = float(len(numa))
    governor = _first_line(root / "cpu" / "cpu0" / "cpufreq" / "scaling_governor")
    if governor:
        facts["governor"] = governor
    threads = _first_line(root / "cpu" / "smt" / "active")
    if threads:
        facts["smt"] = _on_off(int(threads))
    return facts


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").partition("\n")[0].strip()
    except OSError:
        return ""


def _cuda_properties(device: str, index: int) -> Any:
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch {torch.__version__} sees no CUDA device here; use cpu")
    if index >= torch.cuda.device_count():
        raise InputError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA device(s), counted from 0")
    return torch.cuda.get_device_properties(index)


def torch_cuda_facts(properties: Any) -> Facts:
    """What ``torch.cuda.get_device_properties`` says, and the CUDA that torch was built for."""
    import torch

    built_for: Facts = {} if torch.version.cuda is None else {"torch_cuda": torch.version.cuda}
    return built_for | {
        "uuid": str(properties.uuid),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": float(properties.multi_processor_count),
        "memory_total_bytes": float(properties.total_memory),
    }


def _load_nvml() -> Any:
    import pynvml  # the module of the distribution nvidia-ml-py

    return pynvml


def nvml_facts(uuid: str, *, load_nvml: Callable[[], Any]) -> Facts:
    """What the driver says about the device of that UUID.

    CUDA and NVML number devices differently (``CUDA_VISIBLE_DEVICES``, fastest first), so they are joined on the UUID.

    Args:
        uuid: torch's, without the ``GPU-`` that NVML puts before it.
        load_nvml: imports ``pynvml``; may raise ``ImportError``.

    Returns:
        The facts, without those that this device does not support; or ``"nvml"`` alone, saying why there are none.
    """
    try:
        nvml = load_nvml()
    except ImportError:
        return {"nvml": "not asked: nvidia-ml-py is not installed"}
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return {"nvml": f"not available: {error}"}
    try:
        handle = handle_by_uuid(nvml, uuid)
        if handle is None:
            return {"nvml": f"knows no device with UUID {uuid}"}
        return _facts_of_handle(nvml, handle) | _links_of_handle(nvml, handle)
    finally:
        nvml.nvmlShutdown()


def open_nvml() -> Any | None:
    """``pynvml``, initialised for the rest of the process; ``None`` where it or the driver is missing."""
    try:
        nvml = _load_nvml()
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def handle_by_uuid(nvml: Any, uuid: str) -> Any | None:
    """NVML's handle of the device with torch's UUID; ``None`` where it knows none."""
    for prefix in ("GPU-", "MIG-"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(prefix + uuid)
        except nvml.NVMLError:
            continue
    return None


def _facts_of_handle(nvml: Any, handle: Any) -> Facts:
    """Clocks in Hz, power in W, bandwidth facts as the driver counts them; unsupported ones left out."""
    questions: dict[str, Callable[[], str | float]] = {
        "driver": lambda: str(nvml.nvmlSystemGetDriverVersion()),
        "cuda_driver": lambda: _cuda_version(nvml.nvmlSystemGetCudaDriverVersion_v2()),
        "nvml_name": lambda: str(nvml.nvmlDeviceGetName(handle)),
        "pci_bus": lambda: str(nvml.nvmlDeviceGetPciInfo(handle).busId),
        "pcie_max_generation": lambda: float(nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
        "pcie_max_width": lambda: float(nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
        "sm_max_frequency_hz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6,
        "sm_frequency_hz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6,
        "memory_max_frequency_hz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM) * 1e6,
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "temperature_celsius": lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        "nvml_memory_used_bytes": lambda: float(nvml.nvmlDeviceGetMemoryInfo(handle).used),
        "power_limit_default_w": lambda: nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) / 1e3,
        "sm_application_frequency_hz": lambda: nvml.nvmlDeviceGetApplicationsClock(handle, nvml.NVML_CLOCK_SM) * 1e6,
        "ecc": lambda: _on_off(nvml.nvmlDeviceGetEccMode(handle)[0]),
        "mig": lambda: _on_off(nvml.nvmlDeviceGetMigMode(handle)[0]),
        "persistence": lambda: _on_off(nvml.nvmlDeviceGetPersistenceMode(handle)),
        "pcie_generation": lambda: float(nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)),
        "pcie_width": lambda: float(nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
        "numa_node": lambda: _numa_node(nvml, handle),
        "throttle_reasons": lambda: _throttle_reasons(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
    }
    facts: Facts = {}
    for name, ask in questions.items():
        try:
            facts[name] = ask()
        except nvml.NVMLError:
            continue  # not supported by this device or driver: then it is no fact
    return facts


def _numa_node(nvml: Any, handle: Any) -> float:
    """Of the processor that the device is attached to; NVML's own answer is of devices whose memory is a NUMA node."""
    attached = numa_node_of_pci(str(nvml.nvmlDeviceGetPciInfo(handle).busId), PCI_DEVICES)
    return float(nvml.nvmlDeviceGetNumaNodeId(handle)) if attached is None else attached


def numa_node_of_pci(bus: str, devices: Path) -> float | None:
    """What Linux says of the PCI device; ``None`` where it says nothing, or that it does not know (-1).

    Args:
        bus: ``domain:bus:device.function`` in hexadecimal; NVML's domain has eight digits, Linux' has four.
        devices: the folder of all PCI devices.
    """
    domain, _, rest = bus.lower().partition(":")
    try:
        node = int(_first_line(devices / f"{int(domain, 16):04x}:{rest}" / "numa_node"))
    except ValueError:
        return None
    return float(node) if node >= 0 else None


def _links_of_handle(nvml: Any, handle: Any) -> Facts:
    """NVLinks that are up; none where the device has no NVLink."""
    active = 0
    for link in range(int(nvml.NVML_NVLINK_MAX_LINKS)):
        try:
            active += int(nvml.nvmlDeviceGetNvLinkState(handle, link) == nvml.NVML_FEATURE_ENABLED)
        except nvml.NVMLError:
            break
    return {"nvlinks": float(active)}


def _throttle_reasons(nvml: Any, bits: int) -> str:
    prefix = "nvmlClocksThrottleReason"
    reasons = {name.removeprefix(prefix): getattr(nvml, name) for name in dir(nvml) if name.startswith(prefix)}
    single = {name: bit for name, bit in reasons.items() if isinstance(bit, int) and bit.bit_count() == 1}
    return ", ".join(sorted(name for name, bit in single.items() if bits & bit)) or "none"


def _on_off(value: int) -> str:
    return "on" if value else "off"


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
