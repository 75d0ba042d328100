"""How many cores this process may use, and where the kernel's CPU controller (cgroup v1 or v2) is mounted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

PROC = Path("/proc")


class CpuController(msgspec.Struct, frozen=True):
    """The CPU controller: its version, where it is mounted, and this process's own group below that."""

    version: Literal[1, 2]
    root: Path
    own_group: Path


def find_cpu_controller(proc: Path = PROC) -> CpuController | None:
    """The mounted CPU controller; ``None`` where there is none (or no Linux)."""
    try:
        mounts = (proc / "self" / "mountinfo").read_text()
        groups = (proc / "self" / "cgroup").read_text()
    except OSError:
        return None
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        mounted_root, mount_point = (_unescape(field) for field in before.split()[3:5])
        kind, _, options = after.split(" ", 2)
        root = Path(mount_point)
        if kind == "cgroup" and "cpu" in options.split(","):
            return CpuController(1, root, root / _below(mounted_root, _own_path(groups, "cpu")))
        if kind == "cgroup2" and "cpu" in _read(root / "cgroup.controllers").split():
            return CpuController(2, root, root / _below(mounted_root, _own_path(groups, "")))
    return None


def available_cpus(proc: Path = PROC) -> float:
    """Cores that this process may use: those it may run on, less where a quota of its group or one above is lower."""
    cores = float(len(os.sched_getaffinity(0)))
    controller = find_cpu_controller(proc)
    return cores if controller is None else min([cores, *_quotas(controller)])


def _quotas(controller: CpuController) -> Iterator[float]:
    """Quotas in cores, from the own group up to the root."""
    group = controller.own_group
    while True:
        if controller.version == 1:
            quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        else:
            quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)
        if group == controller.root or controller.root not in group.parents:
            return
        group = group.parent


def _own_path(groups: str, controller: str) -> str:
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def _below(mounted_root: str, path: str) -> str:
    """The part of a group's path that is below what is mounted: a container sees its own group as the root."""
    return path.removeprefix(mounted_root).lstrip("/")


def _unescape(field: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), field)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
