"""Let a process go on the moment that a message wakes it, while others compute on the same cores.

On a machine of its own a node that waits goes on at once. On one that several nodes share, the kernel lets a thread
that wakes wait for the turn of another to end, often until the next tick (4 ms at 250 Hz): with four nodes on two cores
a message of 6 KB took 2.0 ms in the mean instead of 0.2. So threads that wait, receive and send run in real time
(SCHED_FIFO, sched(7)), and all that computes in turn with the others (SCHED_OTHER). That stretches the iterations of
others by little, and their pace has room for it (``pacing``).
"""

from __future__ import annotations

import os
from pathlib import Path

REALTIME_VARIABLE = "HELIXBENCH_REALTIME"
"""Set in the environment of a testbed's processes, where they may schedule themselves in real time."""

_TASKS = Path("/proc/self/task")
_TRANSPORT_NAME = "ZMQbg"  # that libzmq gives its threads


class Wakeups:
    """How the kernel is to treat the thread that computes, and those of the transport.

    Args:
        is_realtime: whether it may be asked at all; without it nothing is.
    """

    def __init__(self, *, is_realtime: bool) -> None:
        self._is_realtime = is_realtime
        self._is_waiting = False

    @classmethod
    def granted(cls) -> Wakeups:
        """As whoever started this process found out."""
        return cls(is_realtime=REALTIME_VARIABLE in os.environ)

    def waiting(self) -> None:
        """From now on this thread waits, receives and sends; what it starts does not inherit that."""
        if self._is_realtime and not self._is_waiting:
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
            self._is_waiting = True

    def computing(self) -> None:
        """From now on this thread computes."""
        if self._is_waiting:
            os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
            self._is_waiting = False

    def transport(self, *, is_serving: bool) -> None:
        """The transport's threads send and receive for a stage; what is measured without one takes its turns."""
        if self._is_realtime:
            for thread in _transport_threads():
                if is_serving:
                    os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(2))
                else:
                    os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def _transport_threads() -> list[int]:
    found = []
    for task in _TASKS.iterdir():
        try:
            if (task / "comm").read_text().startswith(_TRANSPORT_NAME):
                found.append(int(task.name))
        except OSError:
            continue  # it has ended
    return found
