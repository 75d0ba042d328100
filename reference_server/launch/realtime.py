"""Whether the processes of a testbed may go on at once when a message wakes them (SCHED_FIFO; see ``wakeups``).

Version 1 of the CPU controller, where the kernel schedules real-time groups (CONFIG_RT_GROUP_SCHED), gives a group no
real-time turns unless it is granted some; version 2 and other kernels need no grant.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .agents import Place

PERIOD_US = 100_000  # a process that has used up its grant stands still for no longer than this
TOTAL = 0.9  # part of the time that all groups together may be granted; the kernel's own limit is 0.95
MOST = 0.15  # of a node: receiving and sending take about 0.03
MOST_COORDINATOR = 0.3
_TRY = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"


def node_grant(num_nodes: int) -> float:
    """Part of the time that each of so many nodes is granted."""
    return min(MOST, (TOTAL - MOST_COORDINATOR) / max(1, num_nodes))


def grant_realtime(group: Path, share: float) -> None:
    """Let the group's threads wait and send in real time, for that part of the time on each core.

    Raises:
        OSError: the kernel does not let us.
    """
    runtime = group / "cpu.rt_runtime_us"
    if runtime.exists():
        (group / "cpu.rt_period_us").write_text(str(PERIOD_US))
        runtime.write_text(str(round(share * PERIOD_US)))


def why_no_realtime(place: Place) -> str:
    """Empty where a process in that place may schedule itself in real time, else why not, found by trying it."""
    done = subprocess.run(
        place.enter_argv([sys.executable, "-I", "-S", "-c", _TRY]), capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it ended at once"])[-1]
