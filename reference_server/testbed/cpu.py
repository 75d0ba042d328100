"""Cores of this machine: how many this process may use, and on which it runs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from helixbench.errors import InputError
from helixbench.profiler.machine import CGROUP, cpu_quota_cores


def available_cpus() -> float:
    """Number of cores that this process may use: those it may run on, or its container's quota where that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    return min(cores, cpu_quota_cores(CGROUP) or cores)


def parse_cpus(text: str) -> tuple[int, ...]:
    """Cores of a list like ``0,2-3``; none where it is empty.

    Raises:
        InputError: it is no such list.
    """
    cores: list[int] = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part, flags=re.ASCII)
        if match is None:
            raise InputError(f"--cpus {text}: need cores like 0,2-3")
        cores += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(cores)


def use_cpus(cores: Sequence[int]) -> None:
    """Run this process on those cores alone; on any where there are none.

    Raises:
        InputError: a core that is not there for this process.
    """
    if not cores:
        return
    allowed = os.sched_getaffinity(0)
    if missing := sorted(set(cores) - allowed):
        raise InputError(f"--cpus: no core {missing[0]} here; this process may use {sorted(allowed)}")
    os.sched_setaffinity(0, cores)
