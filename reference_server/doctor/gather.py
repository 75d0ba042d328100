"""Gather what a node's doctor looks at, from the driver, the OS and the libraries."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from helixbench.profiler.network.iperf3 import Iperf3MissingError, iperf3_source
from helixbench.reference_server.doctor.facts import GpuFacts, NodeFacts
from helixbench.reference_server.testbed.cpu import available_cpus, find_cpu_controller
from helixbench.reference_server.testbed.namespaces import why_no_namespaces

LIBRARIES = ("torch", "transformers", "pyzmq", "msgspec", "safetensors", "tokenizers")
PROGRAMS = ("ip", "tc", "unshare")
CAP_NET_ADMIN = 12  # bit of CapEff, see capabilities(7)
FactT = TypeVar("FactT")


def gather_facts() -> NodeFacts:
    """Look at this machine. Takes a second or two where torch is not loaded yet."""
    meminfo = _meminfo(_text(Path("/proc/meminfo")))
    controller = find_cpu_controller()
    torch_facts = _torch_facts()
    folder = tempfile.gettempdir()
    return NodeFacts(
        host=platform.node(),
        system=platform.system(),
        python=platform.python_version(),
        versions={name: version for name in LIBRARIES if (version := _version(name)) is not None},
        requirements=_asked(lambda: tuple(metadata.requires("helixbench") or ())) or (),
        requires_python=_asked(lambda: metadata.metadata("helixbench")["Requires-Python"]) or "",
        has_nvidia_device=any(Path("/dev").glob("nvidia[0-9]*")) or Path("/proc/driver/nvidia").exists(),
        **_nvml_facts(),
        **torch_facts,
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        iperf3=_iperf3_version(),
        programs=tuple(name for name in PROGRAMS if shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin")),
        is_root=hasattr(os, "geteuid") and os.geteuid() == 0,
        can_administer_network=_has_capability(_text(Path("/proc/self/status")), CAP_NET_ADMIN),
        why_no_testbed=why_no_namespaces(),
        cgroup_version=None if controller is None else controller.version,
        logical_cores=os.cpu_count() or 1,
        usable_cores=_asked(available_cpus) or float(os.cpu_count() or 1),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        governors=tuple(sorted({_text(path).strip() for path in _governor_files()} - {""})),
        memory_available_bytes=meminfo.get("MemAvailable"),
        memory_limit_bytes=_memory_limit(),
        disk_folder=folder,
        disk_free_bytes=float(shutil.disk_usage(folder).free),
        max_open_files=_max_open_files(),
        is_clock_synchronised=_is_clock_synchronised(),
        can_open_port=_port_problem(),
    )


def _asked(ask: Callable[[], FactT]) -> FactT | None:
    try:
        return ask()
    except (OSError, metadata.PackageNotFoundError):
        return None


def _text(path: Path) -> str:
    return _asked(lambda: path.read_text(encoding="utf-8", errors="replace")) or ""


def _version(library: str) -> str | None:
    return _asked(lambda: metadata.version(library))


def _iperf3_version() -> str | None:
    try:
        return iperf3_source().removeprefix("iperf3").strip() or "of an unknown version"
    except (Iperf3MissingError, OSError, subprocess.SubprocessError):
        return None


def _governor_files() -> list[Path]:
    return list(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"))


def _meminfo(text: str) -> dict[str, float]:
    """Bytes by name, out of the text of ``/proc/meminfo``."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        parts = value.split()
        if len(parts) == 2 and parts[1] == "kB":
            found[name] = float(parts[0]) * 1024
    return found


def _has_capability(status: str, bit: int) -> bool | None:
    """Whether the effective capabilities in the text of ``/proc/PID/status`` hold that bit; ``None``: it says none."""
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> bit & 1)
    return None


def _memory_limit() -> float | None:
    """Of our own group, where there is one that limits."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _text(Path(path)).strip()
        if text.isdigit() and int(text) < 1 << 60:
            return float(text)
    return None


def _max_open_files() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _port_problem() -> str:
    """Empty where a port can be opened to listen on."""
    try:
        with socket.create_server(("0.0.0.0", 0)):
            return ""
    except OSError as error:
        return str(error.strerror or error)


class _Timex(ctypes.Structure):
    """The head of ``struct timex``; the rest is room."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


_STA_UNSYNC = 0x40


def _is_clock_synchronised() -> bool | None:
    """What the kernel was told by an NTP daemon; ``None`` where it cannot be asked."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        state = _Timex(modes=0)
        if libc.adjtimex(ctypes.byref(state)) < 0:
            return None
    except (OSError, AttributeError):
        return None
    return not state.status & _STA_UNSYNC


def _torch_facts() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a torch that does not fit its CUDA or this machine fails in many ways
        return {"torch_problem": f"{type(error).__name__}: {error}"}
    return {
        "torch_cuda": torch.version.cuda,
        "torch_sees_gpus": torch.cuda.device_count(),
        "torch_uuids": torch_uuids(torch.cuda),
    }


def torch_uuids(cuda: Any) -> tuple[str, ...] | None:
    """UUIDs of the devices that torch sees, as NVML writes them, in torch's order; ``None`` where it cannot tell.

    Args:
        cuda: ``torch.cuda``, or what stands for it.
    """
    try:
        return tuple(f"GPU-{cuda.get_device_properties(index).uuid}" for index in range(cuda.device_count()))
    except (RuntimeError, AssertionError, AttributeError):
        return None  # CUDA cannot be started, or torch is too old to say


def _nvml_facts() -> dict[str, Any]:
    try:
        import pynvml
    except ImportError:
        return {"nvml_problem": "nvidia-ml-py is not installed"}
    return nvml_facts(pynvml)


def nvml_facts(nvml: Any) -> dict[str, Any]:
    """Driver and GPUs as NVML tells them.

    Args:
        nvml: the module ``pynvml``, or what stands for it.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return {"nvml_problem": str(error)}
    try:
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return {
            "driver": str(nvml.nvmlSystemGetDriverVersion()),
            "driver_cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
            "gpus": tuple(_gpu_facts(nvml, handle) for handle in handles),
        }
    except nvml.NVMLError as error:
        return {"nvml_problem": str(error)}
    finally:
        nvml.nvmlShutdown()


def _gpu_facts(nvml: Any, handle: Any) -> GpuFacts:
    def ask(question: Callable[[], FactT]) -> FactT | None:
        try:
            return question()
        except nvml.NVMLError:
            return None  # not supported by this device or driver

    memory = ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    return GpuFacts(
        name=str(nvml.nvmlDeviceGetName(handle)),
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        throttle_reasons=ask(lambda: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))),
        is_persistent=ask(lambda: nvml.nvmlDeviceGetPersistenceMode(handle) == nvml.NVML_FEATURE_ENABLED),
        is_mig=ask(lambda: nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE),
        is_ecc=ask(lambda: nvml.nvmlDeviceGetEccMode(handle)[0] == nvml.NVML_FEATURE_ENABLED),
        uncorrected_errors=ask(
            lambda: int(
                nvml.nvmlDeviceGetTotalEccErrors(
                    handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                )
            )
        ),
        memory_used_bytes=None if memory is None else float(memory.used),
        memory_total_bytes=None if memory is None else float(memory.total),
        temperature_celsius=ask(lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
        sm_frequency_hz=ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6),
        sm_max_frequency_hz=ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6),
    )
