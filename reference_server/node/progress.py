"""Progress: an agent's iterations against what its cost model says of them, and the report that follows. No sockets."""

from __future__ import annotations

from helixbench.profiler.cost.model import StageCost
from helixbench.reference_server.node.runtime import NodeRuntime
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.scheduling.watch import REPORT_EVERY_S, PeerSeen, Report
from helixbench.solver.simulation.stage_time import counts_by_entry

LONGEST = 3.0
"""An iteration is to end within this many times its predicted time."""


class Progress:
    """What one loaded stage has done.

    Args:
        runtime: of the stage.
        cost: that its iterations are compared with; ``None`` where the plan has none for the node.
        held: its layers.
        is_last: whether the model ends with them.
        time_scale: seconds by the wall clock that stand for one of the device's.
        now_s: the time.
    """

    def __init__(
        self,
        runtime: NodeRuntime,
        cost: StageCost | None,
        held: LayerRange,
        *,
        is_last: bool,
        time_scale: float,
        now_s: float,
    ) -> None:
        self._runtime = runtime
        self._cost, self._held, self._is_last, self._scale = cost, held, is_last, time_scale
        self._iterations = 0
        self._measured_s = self._predicted_s = 0.0  # of the device
        self._ended_s = now_s  # when an iteration last did
        self._next_s = self._may_take_s = 0.0  # of the iteration that runs: predicted, and at the longest
        self._last_s = 0.0  # what the last iteration took by the wall clock
        self.num_dropped = 0  # messages of foreign runs, which the runtime does not see
        self.is_leaving = False
        self.next_s = now_s  # when the next report is due

    def begin(self) -> float:
        """An iteration of the runtime's ``shape`` begins; the longest that it may take by the wall clock."""
        if self._cost is None:
            self._may_take_s = LONGEST * self._last_s
        else:
            entries = counts_by_entry(self._runtime.shape)
            self._next_s = self._cost.time_with_entries_s(entries, end=self._held.end, last=self._is_last)
            self._may_take_s = LONGEST * self._scale * self._next_s
        return self._may_take_s

    def ran(self, *, begin_s: float, end_s: float) -> None:
        """The iteration ended; times by the wall clock."""
        self._iterations += 1
        self._last_s, self._ended_s = end_s - begin_s, end_s
        self._may_take_s = 0.0
        if self._cost is not None:
            self._measured_s += self._last_s / self._scale
            self._predicted_s += self._next_s

    def report(self, *, now_s: float, peers: tuple[PeerSeen, ...]) -> Report:
        """What to say now, and by when the next report comes."""
        due_in_s = max(REPORT_EVERY_S, self._may_take_s)
        self.next_s = now_s + REPORT_EVERY_S
        return Report(
            due_in_s=due_in_s,
            iterations=self._iterations,
            measured_s=self._measured_s,
            predicted_s=self._predicted_s,
            has_work=self._runtime.has_work,
            progress_age_s=now_s - self._ended_s,
            kv_used_tokens=self._runtime.runner.kv.used_tokens,
            is_leaving=self.is_leaving,
            num_dropped=self.num_dropped + self._runtime.num_dropped,
            peers=peers,
        )
