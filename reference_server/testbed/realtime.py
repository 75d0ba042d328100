"""Whether the processes of a testbed may go on at once when a message wakes them (SCHED_FIFO; see ``wakeups``)."""

from __future__ import annotations

import subprocess
import sys

from helixbench.reference_server.testbed.process import Place

TOTAL = 0.9  # part of the time that all groups together may be granted; the kernel's own limit is 0.95
MOST = 0.15  # of a node: receiving and sending take about 0.03
MOST_COORDINATOR = 0.3
_TRY = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"


def node_grant(num_nodes: int) -> float:
    """Part of the time that each of so many nodes is granted."""
    return min(MOST, (TOTAL - MOST_COORDINATOR) / max(1, num_nodes))


def why_no_realtime(place: Place) -> str:
    """Empty where a process in that place may schedule itself in real time, else why not, found by trying it."""
    done = subprocess.run(
        place.enter_argv([sys.executable, "-I", "-S", "-c", _TRY]), capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it ended at once"])[-1]
