"""Stand in for a slower processor: an iteration is held back until that processor would have ended it.

What is held back is the iteration's result, so that whoever waits for it waits as long as for a slow node. The time is
counted in CPU time, which other processes on the machine do not stretch, and at the speed that two reference works had
while the profile was made (``profiler.processor_speed``), because a shared machine is faster in one moment than in the
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

from profiler.processor_speed import ProcessorSpeed, mean_speed, seconds_at
from profiler.reference_kernel import ReferenceKernel

from .wakeups import Wakeups

_EVERY_CPU_S = 0.003  # of work for a run of the kernel, which takes about a tenth of that
_FEW, _KEPT = 6, 100
"""Runs that the present speed is the mean of where an iteration had fewer of its own, and those that the speed of some
seconds is of, which also say which are disturbed; of an iteration of more the last of them count."""
NOMINAL_S = 8.0
"""So long the speed that a share is of is looked for: in the first seconds other nodes are still loading."""
_NOMINAL_RUNS = 50
PROFILED_SHARE = 0.25
"""A node of a smaller share is held back as one of this while it is profiled, and what it would have waited longer is
counted instead: it takes as many more samples, and the nodes of a testbed still fit a machine together."""
_HEADROOM = 1.25
"""The processor that shares are of takes so many times as long for the two works as this one: a machine that others
make slower by so much can still keep the pace, and nodes whose shares add up to all of its cores seldom wait for one
another."""


_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # number of the system call
_SLICE_NS = 500_000


class Pacer:
    """Holds an agent's iterations back to a share of a processor.

    Args:
        share: of a processor, 0 to 1.
        wakeups: are told when an iteration is only held back any more.

    Attributes:
        nominal: speed of the processor that the share is of: this one's works take ``_HEADROOM`` times as long there.
        least_share: wait only as long as a node of this share would, where that is more than the own.
        skipped_s: what was not waited for that reason, in all.
    """

    def __init__(self, share: float, wakeups: Wakeups | None = None) -> None:
        self._share = share
        self.least_share = 0.0
        self.skipped_s = 0.0
        self.wakeups = wakeups or Wakeups(is_realtime=False)
        self._kernel = ReferenceKernel()
        first = self._kernel.speed()
        self._runs = deque([first], maxlen=_KEPT)
        self._nominal_runs: list[ProcessorSpeed] | None = None  # kept while the nominal speed is measured
        self._unread = (0, 0.0, 0.0)  # runs since the mean was last asked, and sums of their two times
        self._own = 0  # runs in the present iteration
        self._looked_s = time.thread_time()
        self.nominal = _with_headroom(first)
        self._counted_s = time.process_time()

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
        self.nominal = _with_headroom(mean_speed(runs, last=len(runs)))

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
        ``flops`` are those that arithmetic bounds (``processor_speed.seconds_at``).
        """
        self.look()
        cpu_s = time.process_time() - self._counted_s
        runs = tuple(self._runs)
        now, lately = mean_speed(runs, last=max(_FEW, self._own)), mean_speed(runs, last=_KEPT)
        self._own = 0
        work_s = seconds_at(self.nominal, now=now, lately=lately, cpu_s=cpu_s, flops=flops)
        until = begin + work_s / max(self._share, self.least_share)
        self._counted_s = time.process_time()
        self.wakeups.waiting()
        time.sleep(max(0.0, until - time.perf_counter()))
        if self.least_share > self._share:
            self.skipped_s += max(0.0, begin + work_s / self._share - time.perf_counter())

    def mean_speed(self) -> ProcessorSpeed | None:
        """Mean of the kernel's runs since this was last asked; ``None`` where there were none."""
        count, weights_s, matmul_s = self._unread
        self._unread = (0, 0.0, 0.0)
        return ProcessorSpeed(weights_s / count, matmul_s / count) if count else None


def _with_headroom(speed: ProcessorSpeed) -> ProcessorSpeed:
    return ProcessorSpeed(_HEADROOM * speed.weights_s, _HEADROOM * speed.matmul_s)


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
