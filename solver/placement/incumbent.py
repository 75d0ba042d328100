"""The state of a search: the best placement so far, and the bound proven so far. Both only improve."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from helixbench.solver.bounds.configurations import Configurations
from helixbench.solver.bounds.work import coordinator_bound, work_bound
from helixbench.solver.expected.analytic import predict_means
from helixbench.solver.flow.max_flow import largest_flow
from helixbench.solver.placement import milp
from helixbench.solver.placement.progress import OnProgress, Progress
from helixbench.solver.problem.plan import LayerRange, Placement
from helixbench.solver.problem.question import Question

PROVEN = 1e-6
"""Relative gap at which a plan counts as optimal."""

LEADING = 0.7
"""Of the best by means alone: what may still turn out to be the best when requests are followed."""

WRITE_UP = 3.0
"""Times what it takes to score a placement: what it takes to write up its plan and to check it."""

FOLLOWING = 0.1
"""Of the time limit: what is kept for following the plan's requests as far as is reported, where that is the goal."""

MOST_FOLLOWING_S = 6.0
"""About as long as that takes at most."""


@dataclass
class Search:
    """State of one search. It owns the incumbent and the bound; both only improve."""

    question: Question
    limits: milp.Limits
    on_progress: OnProgress
    started: float = field(default_factory=time.perf_counter)
    best: Placement | None = None
    best_score: float = 0.0
    best_flow: float = 0.0
    bound: float = 0.0
    score_s: float = 0.0  # processor seconds of the slowest score so far
    seen: set[tuple[tuple[str, LayerRange], ...]] = field(default_factory=set)
    leaders: list[tuple[float, float, Placement]] = field(default_factory=list)  # (score, max-flow, placement) of each

    def __post_init__(self) -> None:
        capacities = self.question.capacities
        self.bound = min(work_bound(capacities, partial=self.question.partial), coordinator_bound(capacities))
        self.configurations = Configurations(capacities, partial=self.question.partial)
        self.links = capacities.links

    @property
    def is_for_flow(self) -> bool:
        """Whether the largest flow itself is what is asked for."""
        return self.question.objective == "max-flow"

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to look for: the largest flow is asked for, and the best has it."""
        return self.is_for_flow and self.is_proven()

    def elapsed(self) -> float:
        """Seconds since the search began."""
        return time.perf_counter() - self.started

    def left(self) -> float:
        """Seconds until the search has to end, so that the plan is written up by the time limit."""
        following_s = 0.0 if self.is_for_flow else min(MOST_FOLLOWING_S, FOLLOWING * self.limits.time_s)
        return self.limits.time_s - max(following_s, WRITE_UP * self.score_s) - self.elapsed()

    def is_proven(self) -> bool:
        """Whether no placement can have a larger max-flow than the best."""
        return self.best is not None and self.bound <= self.best_flow * (1 + PROVEN)

    def offer(self, placement: Mapping[str, LayerRange] | None, doing: str) -> bool:
        """Take a placement if it scores better than the best; whether it did."""
        if not placement:
            return False
        if any(not self.question.capacities.can_hold(name, held) for name, held in placement.items()):
            return False
        key = tuple(sorted(placement.items()))
        if key in self.seen:
            return False
        self.seen.add(key)
        before = self.best_score
        is_throughput = self.question.objective == "throughput"
        self.score(placement, above=LEADING * before if is_throughput else before, doing=doing)
        return self.best_score > before

    def score(self, placement: Mapping[str, LayerRange], *, above: float, doing: str) -> float | None:
        """Its score if that is more than ``above``, else ``None``; taken as the best where it is."""
        if self._most_at_scarcest_layer(placement) <= above * (1 + PROVEN):
            return None
        began_s = time.process_time()
        flow = largest_flow(self.question, placement)
        self.score_s = max(self.score_s, time.process_time() - began_s)
        if flow.tokens_per_s <= above * (1 + PROVEN):
            return None  # what is expected never exceeds the max-flow
        score = flow.tokens_per_s
        if self.question.objective == "throughput":
            held = flow.used(placement)
            capacities, asked = self.question.capacities, self.question.concurrency
            score = predict_means(capacities, held, flow.links, asked).total_tokens_per_s
            self.leaders.append((score, flow.tokens_per_s, held))
        if score <= above * (1 + PROVEN):
            return None
        if score > self.best_score * (1 + PROVEN):
            self.take(score, flow.tokens_per_s, dict(placement))
            self.tell(doing)
        return score

    def _most_at_scarcest_layer(self, placement: Mapping[str, LayerRange]) -> float:
        """What the nodes of the layer that has least can do in all; no flow exceeds it."""
        capacities = self.question.capacities
        change = [0.0] * (capacities.model.num_layers + 1)
        for name, held in placement.items():
            entries = range(held.start, held.end) if capacities.is_time_shared(name) else (held.start,)
            most = max(capacities.tokens_per_s(name, held, entry) for entry in entries)
            change[held.start] += most
            change[held.end] -= most
        return min(itertools.accumulate(change[:-1]))

    def take(self, score: float, flow: float, placement: Placement) -> None:
        """Make a placement the best."""
        self.best, self.best_score, self.best_flow = placement, score, flow

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
