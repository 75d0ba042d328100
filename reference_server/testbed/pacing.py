"""Stand in for a slower processor: an iteration is held back until that processor would have ended it.

What is held back is the iteration's result, so that whoever waits for it waits as long as for a slow node. The time is
counted in CPU time, which other processes on the machine do not stretch, and at the speed that two reference works had
while the profile was made (``profiler.measure.pace``), because a shared machine is faster in one moment than in the
next: a node of a testbed keeps its speed from its profile to the last request that it serves, as far as its share
leaves room.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import time
from collections import deque
from collections.abc import Callable

from helixbench.profiler.measure.pace import USUAL, Pace, PacedWork, paced_work, seconds_at_pace
from helixbench.profiler.measure.processor_speed import ProcessorSpeed, mean_speed
from helixbench.profiler.measure.reference_kernel import ReferenceKernel
from helixbench.reference_server.testbed.wakeups import Wakeups

_EVERY_CPU_S = 0.003  # of work for a run of the kernel, which takes about a tenth of that
_FEW, _KEPT = 6, 100
"""Runs that the present speed is the mean of where an iteration had fewer of its own, and those that say which are
disturbed; of an iteration of more the last of them count."""
NOMINAL_S = 8.0
"""So long the speed that a share is of is looked for: in the first seconds other nodes are still loading."""
_NOMINAL_RUNS = 50
_PROFILED_PART, _PROFILED_LEAST = 0.75, 0.2
"""While it is profiled a node is held back as one of this part of its share, but of no less than this, and what it
waits more or less for that is not counted. All nodes iterate without a pause then, as they do not when they serve, and
together they keep about as many cores busy like this as then; the smallest take as many more samples."""
_ROOM = 1.35
"""The processor that shares are of takes so many times as long for an iteration as this one: a machine that others make
slower by so much can still keep the pace, and nodes whose shares add up to all of its cores seldom wait for one
another."""


_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # number of the system call
_SLICE_NS = 500_000


class Pacer:
    """Holds an agent's iterations back to a share of a processor.

    Args:
        share: of a processor, 0 to 1.
        wakeups: are told when an iteration is only held back any more.

    Attributes:
        pace: what iterations are brought to before they are held back to the share, ``_ROOM`` times as slow.
        skipped_s: what was not waited while profiled but counts, in all; less what was waited and does not count.
        work: the last iteration.
    """

    def __init__(self, share: float, wakeups: Wakeups | None = None) -> None:
        self._share = self._held_share = share
        self.skipped_s = 0.0
        self.work: PacedWork | None = None
        self.wakeups = wakeups or Wakeups(is_realtime=False)
        self._kernel = ReferenceKernel()
        first = self._kernel.speed()
        self._runs = deque([first], maxlen=_KEPT)
        self._nominal_runs: list[ProcessorSpeed] | None = None  # kept while the nominal speed is measured
        self._unread = (0, 0.0, 0.0)  # runs since the mean was last asked, and sums of their two times
        self._own = 0  # runs in the present iteration
        self._looked_s = time.thread_time()
        self.pace = Pace(first, USUAL)
        self._counted_s = time.process_time()

    def profiling(self, is_profiled: bool) -> None:
        """Whether the node is being profiled from now on, when it waits for another share than its own."""
        self._held_share = max(_PROFILED_LEAST, _PROFILED_PART * self._share) if is_profiled else self._share

    def measure_nominal(self, iterate: Callable[[], None]) -> None:
        """Let the share be of this processor as it is in the next seconds, between iterations."""
        runs: list[ProcessorSpeed] = []
        self._nominal_runs = runs
        until = time.perf_counter() + NOMINAL_S
        try:
            while time.perf_counter() < until or len(runs) < _NOMINAL_RUNS:
                iterate()
        finally:
            self._nominal_runs = None
        self.pace = Pace(mean_speed(runs, last=len(runs)), self.pace.sensitivity)

    def forget(self) -> None:
        """Leave the CPU time until now out of the next iteration: loading a stage is no part of one."""
        self._counted_s = time.process_time()

    def leave_out(self, work: Callable[[], object]) -> None:
        """Do something whose CPU time belongs to no iteration."""
        begin_s = time.thread_time()
        work()
        took_s = time.thread_time() - begin_s
        self._counted_s += took_s
        self._looked_s += took_s

    def look(self) -> None:
        """Time the kernel if so much work was done since the last time; to be called between parts of an iteration.

        Whoever computes at the same time slows both down, for some milliseconds or for all of an iteration, so the
        kernel has to run when the iteration does. Nodes of a pipeline keep step: what runs right after an iteration
        always meets the next node's, or never does.
        """
        begin_s = time.thread_time()
        if begin_s - self._looked_s < _EVERY_CPU_S:
            return
        speed = self._kernel.speed()
        count, weights_s, matmul_s = self._unread
        self._unread = (count + 1, weights_s + speed.weights_s, matmul_s + speed.matmul_s)
        self._runs.append(speed)
        self._own += 1
        if self._nominal_runs is not None:
            self._nominal_runs.append(speed)
        self._looked_s = time.thread_time()
        self._counted_s += self._looked_s - begin_s

    def hold(self, begin: float, *, flops: float = 0.0) -> None:
        """Wait until the iteration that began then (``time.perf_counter``) would be done; see ``wakeups`` for its end.

        All CPU time since the last one counts: sending its result, and receiving, which go on beside an iteration.
        ``flops`` are those that arithmetic bounds (``pace.paced_work``).
        """
        self.look()
        cpu_s = time.process_time() - self._counted_s
        now = mean_speed(tuple(self._runs), last=max(_FEW, self._own))
        self._own = 0
        self.work = paced_work(self.pace.speed, now=now, cpu_s=cpu_s, flops=flops)
        work_s = _ROOM * seconds_at_pace(self.work, self.pace.sensitivity)
        self._counted_s = time.process_time()
        self.wakeups.waiting()
        done = time.perf_counter()
        held, own = (max(done, begin + work_s / share) for share in (self._held_share, self._share))
        time.sleep(held - done)
        self.skipped_s += own - held

    def mean_speed(self) -> ProcessorSpeed | None:
        """Mean of the kernel's runs since this was last asked; ``None`` where there were none."""
        count, weights_s, matmul_s = self._unread
        self._unread = (0, 0.0, 0.0)
        return ProcessorSpeed(weights_s / count, matmul_s / count) if count else None


def take_short_turns() -> bool:
    """Ask the kernel to switch between this process and others more often; ``False`` where it does not offer that.

    Nodes that share a machine's cores wait for each other to end a turn of some milliseconds whenever a message comes,
    as nodes of a cluster do not (sched_setattr(2), Linux 6.12 and later: ``sched_runtime`` of ``SCHED_OTHER``). Threads
    that are started afterwards inherit it.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or os.name != "posix":
        return False
    attributes = struct.pack("IIQiIQQQII", 56, 0, 0, 0, 0, _SLICE_NS, 0, 0, 0, 0)
    return bool(ctypes.CDLL(None).syscall(number, 0, attributes, 0) == 0)
