"""A CPU quota per node: one cgroup each, version 1 or 2."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from helixbench.reference_server.testbed.cpu import CpuController

# Length of a quota's period. A group runs at full speed until its quota for the period is used up, so an iteration
# shorter than that is faster than on a processor that is slow throughout: the period is as short as the quota holds
# (measured: shares of 0.1 to 0.7 within 1 % at 20 ms; at 10 ms small shares are granted every second period only).
PERIOD_US = 20_000
REALTIME_PERIOD_US = 100_000  # threads that have used up their grant stand still for no longer than this
_REMOVE_TIMEOUT_S = 5.0


def group_path(controller: CpuController, *, run_id: str, index: int) -> Path:
    """Where the group of the node of that index is made.

    Right below the root, for in version 2 only the root may hold processes and groups with a controller at once.
    """
    return controller.root / f"helixbench-{run_id}-{index}"


def make_group(controller: CpuController, path: Path) -> None:
    """Make an empty group without a limit.

    Raises:
        OSError: the kernel does not let us.
    """
    if controller.version == 2:
        control = path.parent / "cgroup.subtree_control"
        if "cpu" not in control.read_text().split():
            control.write_text("+cpu")
    path.mkdir(exist_ok=True)


def limit_cpu(controller: CpuController, path: Path, cpu: float) -> None:
    """Let the group's processes together use ``cpu`` cores at most.

    Raises:
        OSError: the kernel does not let us.
    """
    quota_us = round(cpu * PERIOD_US)  # the kernel refuses less than 1000, which is MIN_CPU in spec.py
    if controller.version == 2:
        (path / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
        return
    (path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
    (path / "cpu.cfs_quota_us").write_text(str(quota_us))


def grant_realtime(path: Path, share: float) -> None:
    """Let the group's threads run in real time for that part of the time on each core.

    Version 1 of the controller, where the kernel schedules real-time groups (CONFIG_RT_GROUP_SCHED), gives a group none
    unless it is granted some; version 2 and other kernels need no grant.

    Raises:
        OSError: the kernel does not let us: no more is left, for one.
    """
    runtime = path / "cpu.rt_runtime_us"
    if runtime.exists():
        (path / "cpu.rt_period_us").write_text(str(REALTIME_PERIOD_US))
        runtime.write_text(str(round(share * REALTIME_PERIOD_US)))


def give_realtime_back(path: Path) -> None:
    """Leave the group's grant to others: a removed group keeps it until the kernel has forgotten the group.

    Raises:
        OSError: the group is not there, or uses it.
    """
    runtime = path / "cpu.rt_runtime_us"
    if runtime.exists():
        runtime.write_text("0")


def group_pids(path: Path) -> list[int]:
    """Processes in the group; none where it does not exist."""
    try:
        return [int(pid) for pid in (path / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def remove_group(path: Path) -> None:
    """Remove an emptied group, waiting for its last process to be gone.

    Raises:
        OSError: it is still busy after some seconds.
    """
    deadline = time.monotonic() + _REMOVE_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError):  # still in use, as the group is
            give_realtime_back(path)
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return
