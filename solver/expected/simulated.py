"""What a placement is expected to deliver, by simulation: with how much work, from how many starts, under which limits.

Under some limits on iterations a closed loop has several ways to go on for ever, with other groups of requests and
another throughput: eight requests on three stages went round as three, three and two with 59 tokens/s, or as four and
four with 51. Which way a server takes is chance, so what is reported is the mean over several seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from helixbench.solver.expected.analytic import predict_analytically
from helixbench.solver.expected.batch_limits import FINALISTS, Batching, best_batching
from helixbench.solver.flow.max_flow import Flow
from helixbench.solver.flow.pipelines import pipelines_of
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Expected, LayerRange, Percentiles
from helixbench.solver.simulation.closed_loop import (
    FEWEST_REQUESTS,
    MIN_REQUESTS,
    MIN_ROUNDS,
    TOKENS_PER_EVENT,
    ClosedLoopResult,
    can_admit_longest,
    simulate_closed_loop,
)


@dataclass(frozen=True)
class Effort:
    """How much a simulation may take: work, windows until two agree, requests and rounds in each, and seeds."""

    max_work: int
    max_windows: int = 1
    requests: int = MIN_REQUESTS
    rounds: int = MIN_ROUNDS
    starts: int = 1


RANKED = Effort(max_work=300_000)
"""To compare placements and limits: some two seconds."""

REPORTED = Effort(max_work=2_000_000, max_windows=8, starts=3)
"""For the plan's figure at the concurrency that was asked for: seconds."""

STEP = Effort(max_work=300_000, requests=32, rounds=2)
"""For the plan's figure at each lower concurrency, where a request takes the more work the fewer are in flight."""


class Budget:
    """Work left for the simulations of one plan: of work and not of time, so that a busy machine has the same answer.

    Args:
        work: events and tokens, see ``simulate_closed_loop``.
        whole: what it is a part of.
    """

    def __init__(self, work: int, whole: Budget | None = None) -> None:
        self.left, self._whole = work, whole

    def effort(self, effort: Effort, *, share: float = 1.0) -> Effort:
        """That effort, with no more than this share of the work that is left."""
        return replace(effort, max_work=min(effort.max_work, int(share * self.left)))

    def part(self, share: float) -> Budget:
        """A budget of this share of the work that is left; what is spent of it is spent of the whole."""
        return Budget(int(share * self.left), self)

    def spend(self, work: int) -> None:
        """So much of it has been done."""
        self.left = max(0, self.left - work)
        if self._whole is not None:
            self._whole.spend(work)


MAX_CHOICES = 2_000_000
"""Requests in flight times pipelines to choose from; beyond it, analytically."""

MAX_IN_FLIGHT = 5_000
"""Requests; beyond it, analytically."""

EVENTS_PER_ITERATION = 4
HOPELESS = 4
"""Times the work allowed: a simulation that would need more if its requests never grouped is not tried."""

MOST_FOR_LOOKS = 0.6
"""Share of the work of a thorough comparison of limits for the first look at each; the rest is for those that are best
at first, until they have settled."""

WINDOWS_TO_SETTLE = 2
"""First looks that such a simulation takes at least."""

NO_LIMITS = Batching()


def expected_of(
    capacities: Capacities,
    placement: Mapping[str, LayerRange],
    flow: Flow,
    concurrency: int | None,
    *,
    batching: Batching = NO_LIMITS,
    effort: Effort = RANKED,
) -> Expected:
    """What the placement delivers with this many requests in flight: simulated within the effort, else analytically."""
    held = flow.used(placement)
    found = simulated(capacities, held, flow, concurrency, batching=batching, effort=effort)
    return predict_analytically(capacities, held, flow.links, concurrency) if found is None else found.expected


def simulated(
    capacities: Capacities,
    held: Mapping[str, LayerRange],
    flow: Flow,
    concurrency: int | None,
    *,
    batching: Batching = NO_LIMITS,
    effort: Effort = RANKED,
) -> ClosedLoopResult | None:
    """The simulation of a placement of which the flow uses every node; ``None`` where the effort is too little."""
    if not _is_within(effort, capacities, held, flow, concurrency):
        return None

    def simulate(seed: int) -> ClosedLoopResult | None:
        return simulate_closed_loop(
            capacities,
            held,
            flow.links,
            concurrency,
            max_decode_batch=batching.max_decode_batch,
            max_batch_tokens=batching.max_batch_tokens,
            min_requests=effort.requests if len(capacities.workload.lengths) > 1 else 0,
            min_rounds=effort.rounds,
            max_windows=effort.max_windows,
            max_work=effort.max_work,
            seed=seed,
        )

    return over_starts(simulate, starts=effort.starts, max_work=effort.max_work)


def _is_within(
    effort: Effort, capacities: Capacities, held: Mapping[str, LayerRange], flow: Flow, concurrency: int | None
) -> bool:
    """Whether a simulation is worth trying: every request fits, and two rounds are not hopelessly many events.

    The estimate is for requests that spread evenly over the stages; groups that merge need far fewer events.
    """
    if not can_admit_longest(capacities, held, flow.links):
        return False
    in_flight = predict_analytically(capacities, held, flow.links, concurrency).in_flight or 1.0
    weighted = pipelines_of(held, flow.links)
    if in_flight > MAX_IN_FLIGHT or in_flight * len(weighted) > MAX_CHOICES:
        return False
    stages = sum(len(hops) * share for hops, share in weighted) / sum(share for _, share in weighted)
    requests = in_flight + max(in_flight, FEWEST_REQUESTS)
    tokens = requests * capacities.mix.output_tokens
    events = EVENTS_PER_ITERATION * tokens * stages / max(1.0, in_flight / stages)
    return events <= HOPELESS * effort.max_work and tokens <= TOKENS_PER_EVENT * effort.max_work


def over_starts(
    simulate: Callable[[int], ClosedLoopResult | None], *, starts: int, max_work: int
) -> ClosedLoopResult | None:
    """The mean over seeds 0, 1, ..., as many of ``starts`` as the work allows after the first.

    Args:
        simulate: with that seed; ``None`` where it took too much work.
        starts: number of seeds.
        max_work: of all of them.
    """
    first = simulate(0)
    if first is None:
        return None
    found = [first]
    for seed in range(1, starts):
        if sum(one.work for one in found) + first.work > max_work:
            break
        if (another := simulate(seed)) is not None:
            found.append(another)
    return mean_of(found)


def mean_of(found: Sequence[ClosedLoopResult]) -> ClosedLoopResult:
    """The mean of simulations of one placement; it has settled if all have."""
    each = [one.expected for one in found]
    return ClosedLoopResult(
        expected=msgspec.structs.replace(
            each[0],
            total_tokens_per_s=statistics.fmean(one.total_tokens_per_s for one in each),
            output_tokens_per_s=statistics.fmean(one.output_tokens_per_s for one in each),
            ttft_s=_mean(one.ttft_s for one in each),
            tpot_s=_mean(one.tpot_s for one in each),
            ttft=_mean_percentiles(one.ttft for one in each),
            tpot=_mean_percentiles(one.tpot for one in each),
            low_total_tokens_per_s=min(_known(one.low_total_tokens_per_s for one in each), default=None),
            high_total_tokens_per_s=max(_known(one.high_total_tokens_per_s for one in each), default=None),
            in_flight=_mean(one.in_flight for one in each),
            node_busy=_mean_by_name([one.node_busy for one in each]),
            node_batch_tokens=_mean_by_name([one.node_batch_tokens for one in each]),
            node_share=_mean_by_name([one.node_share for one in each]),
            link_share={
                src: _mean_by_name([one.link_share.get(src, {}) for one in each])
                for src in sorted({src for one in each for src in one.link_share})
            },
        ),
        is_settled=all(one.is_settled for one in found),
        rounds=statistics.fmean(one.rounds for one in found),
        work=sum(one.work for one in found),
        totals=tuple(one.expected.total_tokens_per_s for one in found),
    )


def _mean_by_name(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Name -> mean; what is not there counts as 0."""
    names = sorted({name for one in each for name in one})
    return {name: statistics.fmean(one.get(name, 0.0) for one in each) for name in names}


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean_percentiles(values: Iterable[Percentiles | None]) -> Percentiles | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Percentiles(*(statistics.fmean(each) for each in zip(*map(msgspec.structs.astuple, known), strict=True)))


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class BestLimits:
    """Limits on iterations, and what is expected under them."""

    batching: Batching
    expected: Expected


def best_limits(
    capacities: Capacities,
    placement: Mapping[str, LayerRange],
    flow: Flow,
    budget: Budget,
    *,
    thorough: bool,
    effort: Effort = RANKED,
) -> BestLimits | None:
    """The limits on iterations that bring the most; ``None`` where the effort is too little to simulate them.

    Limits decide by up to a factor of three what a long pipeline delivers.

    Args:
        capacities: of the nodes, for what was asked.
        placement: node -> layer range.
        flow: through it.
        budget: of all simulations; what they take is spent.
        thorough: compare more limits, and the best of them until they have settled, where there is work for that.
        effort: of one simulation.
    """
    held, concurrency = flow.used(placement), capacities.concurrency

    looks = budget.part(MOST_FOR_LOOKS if thorough else 1.0)

    def run(batching: Batching, effort: Effort, budget: Budget) -> ClosedLoopResult | None:
        effort = budget.effort(effort)
        found = simulated(capacities, held, flow, concurrency, batching=batching, effort=effort)
        budget.spend(effort.max_work if found is None else found.work)
        return found

    sizes = [max_batch_tokens(capacities, name) for name in held]
    if None in sizes:  # a table's largest batch is part of what the table means
        unlimited = run(NO_LIMITS, effort, looks)
        return None if unlimited is None else BestLimits(NO_LIMITS, unlimited.expected)
    took = 0  # work of the largest simulation so far

    def expected_under(batching: Batching) -> Expected | None:
        nonlocal took
        found = None if looks.left < took else run(batching, effort, looks)
        took = took if found is None else max(took, found.work)
        return None if found is None else found.expected

    def settled_under(batching: Batching) -> Expected | None:
        if settling.left < WINDOWS_TO_SETTLE * FINALISTS * took:
            return None
        found = run(batching, replace(REPORTED, max_work=settling.left // FINALISTS), budget)
        return None if found is None else found.expected

    settling = budget.part(1 - MOST_FOR_LOOKS)
    asked = predict_analytically(capacities, held, flow.links, concurrency).in_flight or 1.0
    found = best_batching(
        expected_under,
        in_flight=asked,
        stages=max(len(pipeline) for pipeline, _ in pipelines_of(held, flow.links)),
        mix=capacities.mix,
        max_batch_tokens=max(size or 0 for size in sizes),
        thorough=thorough,
        settled_under=settled_under if thorough else None,
    )
    return None if found is None else BestLimits(*found)


def max_batch_tokens(capacities: Capacities, name: str, batching: Batching = NO_LIMITS) -> int | None:
    """Tokens of a node's largest iteration under those limits; ``None`` where it was not measured."""
    cost = capacities.nodes[name].cost
    if cost is None:
        return None
    return min(cost.max_batch_tokens, batching.max_batch_tokens or cost.max_batch_tokens)
