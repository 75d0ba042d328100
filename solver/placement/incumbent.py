"""The state of a search: the incumbent, which is the best placement so far, and the bound proven so far."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from helixbench.solver.bounds.configurations import Configurations
from helixbench.solver.bounds.work import coordinator_bound, work_bound
from helixbench.solver.expected.analytic import predict_analytically
from helixbench.solver.expected.simulated import Budget
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.flow.survival import survives
from helixbench.solver.placement import milp
from helixbench.solver.placement.progress import OnProgress, Progress
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Objective, Placement

PROVEN = 1e-6
"""Relative gap at which a plan counts as optimal."""

LEADING = 0.7
"""Share of the best analytical score from which a placement may still be the best when it is simulated."""

WRITE_UP = 3.0
"""Time to write up a plan and check it, in units of the time to score a placement."""

SIMULATING = 0.2
"""Share of the time limit for simulating the placements with the best scores, and as much again for the plan."""

LEAST_SIMULATING_S, MOST_SIMULATING_S = 1.5, 15.0
"""Limits of either time."""

MOST_BESIDE_S = 3.0
"""Upper limit where the question is about the max-flow."""

WORK_PER_S = 120_000
"""Events and tokens of a simulation in a second."""


def simulation_budget(time_limit_s: float, objective: Objective) -> Budget:
    """Work of simulations, for the plan or for the placements to choose from.

    For the throughput it is part of the time limit; beside the max-flow it comes after it, and is little.
    """
    most_s = MOST_SIMULATING_S if objective == "throughput" else MOST_BESIDE_S
    return Budget(int(WORK_PER_S * min(most_s, max(LEAST_SIMULATING_S, SIMULATING * time_limit_s))))


class Candidate(NamedTuple):
    """A placement with its score by the objective and its max-flow, tokens/s."""

    score: float
    flow: float
    placement: Placement


@dataclass
class Search:
    """State of one search. It owns the incumbent and the bound; both only improve."""

    capacities: Capacities
    objective: Objective
    limits: milp.Limits
    on_progress: OnProgress
    started: float = field(default_factory=time.perf_counter)
    best: Placement | None = None
    best_score: float = 0.0
    best_flow: float = 0.0
    bound: float = 0.0
    score_s: float = 0.0  # processor seconds of the slowest score so far
    seen: set[tuple[tuple[str, LayerRange], ...]] = field(default_factory=set)  # placements offered
    candidates: list[Candidate] = field(default_factory=list)  # those to simulate, for the objective throughput

    def __post_init__(self) -> None:
        capacities = self.capacities
        self.bound = min(work_bound(capacities), coordinator_bound(capacities))
        self.configurations = Configurations(capacities)

    @property
    def is_for_flow(self) -> bool:
        """Whether the objective is the max-flow."""
        return self.objective == "max-flow"

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to look for: the max-flow is the objective, and the incumbent's is proven."""
        return self.is_for_flow and self.is_proven()

    def elapsed(self) -> float:
        """Seconds since the search began."""
        return time.perf_counter() - self.started

    def left(self) -> float:
        """Seconds until the search has to end, so that the plan is written up by the time limit."""
        simulating_s = 0.0 if self.is_for_flow else 2 * min(MOST_SIMULATING_S, SIMULATING * self.limits.time_s)
        return self.limits.time_s - max(simulating_s, WRITE_UP * self.score_s) - self.elapsed()

    def is_proven(self) -> bool:
        """Whether no placement can have a larger max-flow than the incumbent."""
        return self.best is not None and self.bound <= self.best_flow * (1 + PROVEN)

    def offer(self, placement: Mapping[str, LayerRange] | None, doing: str) -> bool:
        """Make a placement the incumbent if it scores better; whether it did."""
        if not placement:
            return False
        placement = self._with_one_of_each_group(placement)
        if any(not self.capacities.can_hold(name, held) for name, held in placement.items()):
            return False
        key = tuple(sorted(placement.items()))
        if key in self.seen:
            return False
        self.seen.add(key)
        before = self.best_score
        self.score(placement, above=before if self.is_for_flow else LEADING * before, doing=doing)
        return self.best_score > before

    def score(self, placement: Mapping[str, LayerRange], *, above: float, doing: str) -> float | None:
        """Its score if that is more than ``above``, else ``None``; it becomes the incumbent where it is the best.

        Three looks, cheapest first: no flow exceeds what the scarcest layer's nodes can do, and no expected throughput
        exceeds the max-flow. ``None`` also where it does not survive what it has to, or uses two nodes of an exclusive
        group.
        """
        if len(self._with_one_of_each_group(placement)) < len(placement):
            return None
        if self._most_at_scarcest_layer(placement) <= above * (1 + PROVEN):
            return None
        began_s = time.process_time()
        flow = max_flow(self.capacities, placement)
        if flow.tokens_per_s <= above * (1 + PROVEN):
            return None
        if self.capacities.survive and not survives(self.capacities, placement):
            return None
        score = flow.tokens_per_s
        if not self.is_for_flow:
            flow = max_flow(self.capacities, placement, spread=True)  # the one that routing follows
            held = flow.used(placement)
            expected = predict_analytically(self.capacities, held, flow.links, self.capacities.concurrency)
            score = expected.total_tokens_per_s
            kept = dict(placement) if self.capacities.survive else held  # what carries nothing now may after a loss
            self.candidates.append(Candidate(score, flow.tokens_per_s, kept))
        self.score_s = max(self.score_s, time.process_time() - began_s)
        if score <= above * (1 + PROVEN):
            return None
        if score > self.best_score * (1 + PROVEN):
            self.take(Candidate(score, flow.tokens_per_s, dict(placement)))
            self.tell(doing)
        return score

    def _with_one_of_each_group(self, placement: Mapping[str, LayerRange]) -> Mapping[str, LayerRange]:
        """The placement with one node of each exclusive group: of those that it uses, the one that can do most work."""
        left_out: set[str] = set()
        for names in self.capacities.exclusive_groups.values():
            left_out |= set([name for name in names if name in placement][1:])
        return {name: held for name, held in placement.items() if name not in left_out} if left_out else placement

    def _most_at_scarcest_layer(self, placement: Mapping[str, LayerRange]) -> float:
        capacities = self.capacities
        change = [0.0] * (capacities.model.num_layers + 1)
        for name, held in placement.items():
            entries = capacities.entries(held) if capacities.mixes_entries(name) else (held.start,)
            most = max(capacities.tokens_per_s(name, held, entry) for entry in entries)
            change[held.start] += most
            change[held.end] -= most
        return min(itertools.accumulate(change[:-1]))

    def take(self, candidate: Candidate) -> None:
        """Make a candidate the incumbent."""
        self.best_score, self.best_flow, self.best = candidate

    def lower_bound_to(self, bound: float, doing: str) -> None:
        """Take a proven upper bound if it is lower than the one at hand."""
        if bound < self.bound:
            self.bound = bound
            self.tell(doing)

    def tell(self, doing: str, *, incumbent: float | None = None, bound: float | None = None) -> None:
        """Report where the search is."""
        known = [value for value in (incumbent, self.best_flow) if value]
        self.on_progress(
            Progress(
                seconds=self.elapsed(),
                incumbent_tokens_per_s=max(known) if known else None,
                bound_tokens_per_s=min(self.bound, bound) if bound is not None else self.bound,
                doing=doing,
                expected_tokens_per_s=None if self.is_for_flow or self.best is None else self.best_score,
            )
        )
