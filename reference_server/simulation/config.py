"""What to simulate: load, length, routing and events of one run."""

from __future__ import annotations

import msgspec

from helixbench.reference_server.run_log import LatencyLimits
from helixbench.solver.problem.arrivals import Arrivals
from helixbench.solver.problem.traces import TracedRequest
from helixbench.solver.problem.workload import Workload
from helixbench.solver.scheduling.work import Routing
from helixbench.solver.simulation.events import Event


class SimulationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    The window begins at ``warmup_s``, in a closed loop not before as many requests have ended as are in flight. It
    ends after ``duration_s``, or when ``num_requests`` have ended: in a closed loop so many inside the window, else all
    that arrive; and before that where nothing more can arrive and all requests have ended.

    Attributes:
        concurrency: requests of a closed loop; of other arrivals the most that are in flight.
        kv_share: share of each KV cache that admission fills; ``None`` for all of it, and for 80 % where a node has
            only a capacity table, on which the table's meaning rests.
        limits: of goodput.
    """

    workload: Workload
    arrivals: Arrivals
    trace: tuple[TracedRequest, ...] = ()
    routing: Routing = "iwrr"
    seed: int = 0
    concurrency: int | None = None
    num_requests: int | None = None
    duration_s: float | None = 600.0
    warmup_s: float = 60.0
    kv_share: float | None = None
    events: tuple[Event, ...] = ()
    limits: LatencyLimits | None = None

    @property
    def is_closed_loop(self) -> bool:
        """Whether every request that ends is followed by the next."""
        return self.arrivals.kind == "closed loop"
