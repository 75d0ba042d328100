"""Facts of this machine at this moment that decide whether it is fit to be profiled and to serve."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import tempfile
from pathlib import Path

from helixbench.profiler.device import Facts, first_text, read_facts, system_questions
from helixbench.profiler.network.iperf3 import Iperf3MissingError, iperf3_source

_LIBRARIES = ("helixbench", "torch", "transformers", "pyzmq")
CGROUP = Path("/sys/fs/cgroup")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide how fast and how exactly a stage runs; those not installed left out."""
    from importlib import metadata  # slow to import: not before a node is asked

    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return versions


def machine_facts() -> Facts:
    """Load, limits, free space, clock and iperf3; a fact that this system does not state is left out."""
    return read_facts(
        system_questions()
        | {
            "host": platform.node,
            "iperf3": _iperf3_version,
            "load_1min": lambda: os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "cpu_quota_cores": lambda: cpu_quota_cores(CGROUP),
            "memory_available_bytes": lambda: available_bytes(first_text(Path("/proc/meminfo"))),
            "memory_limit_bytes": _memory_limit_bytes,
            "temporary_folder": tempfile.gettempdir,
            "disk_free_bytes": lambda: float(shutil.disk_usage(tempfile.gettempdir()).free),
            "max_open_files": _max_open_files,
            "clock_synchronised": _clock_synchronised,
            "nvidia_devices": lambda: float(len(list(Path("/dev").glob("nvidia[0-9]*")))),
        }
    )


def _iperf3_version() -> str | None:
    try:
        return iperf3_source().removeprefix("iperf3").strip() or "of an unknown version"
    except Iperf3MissingError:
        return None


def available_bytes(meminfo: str) -> float | None:
    """``MemAvailable`` in the text of ``/proc/meminfo``."""
    lines = (line.split() for line in meminfo.splitlines())
    return next((float(words[1]) * 1024 for words in lines if words[:1] == ["MemAvailable:"]), None)


def cpu_quota_cores(cgroup: Path) -> float | None:
    """CPU quota of a container's own control group (version 2 or 1), in cores."""
    quota, _, period = first_text(cgroup / "cpu.max").partition(" ")
    if not quota:
        quota = first_text(cgroup / "cpu" / "cpu.cfs_quota_us")
        period = first_text(cgroup / "cpu" / "cpu.cfs_period_us")
    return None if quota.strip() in ("", "max", "-1") else float(quota) / float(period)


def _memory_limit_bytes() -> float | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = first_text(CGROUP / name).strip()
        if text.isdigit() and int(text) < 1 << 60:  # version 1 says "no limit" by a number beyond any memory
            return float(text)
    return None


def _max_open_files() -> float | None:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else float(limit)


class _Timex(ctypes.Structure):
    """The head of ``struct timex``; ``rest`` is room for what follows."""

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


def _clock_synchronised() -> str | None:
    """Whether an NTP daemon keeps the kernel's clock; see adjtimex(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    state = _Timex(modes=0)
    if not hasattr(libc, "adjtimex") or libc.adjtimex(ctypes.byref(state)) < 0:
        return None
    return "no" if state.status & _STA_UNSYNC else "yes"
