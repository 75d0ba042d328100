"""What is asked of the solver: capacities for a workload, the objective and the rule of entry into a layer range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from helixbench.solver.problem.capacity import Capacities

Objective: TypeAlias = Literal["throughput", "max-flow"]


@dataclass(frozen=True)
class Question:
    """What is asked: for which workload, how many requests in flight, and by which rules."""

    capacities: Capacities
    objective: Objective
    partial: bool

    @property
    def concurrency(self) -> int | None:
        """Requests in flight; ``None`` for as many as the KV caches hold."""
        return self.capacities.concurrency
