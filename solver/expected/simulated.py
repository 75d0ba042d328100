"""What a placement is expected to deliver, by simulation: with how much work, from how many starts, under which limits.

Under some limits on iterations a closed loop has several ways to go on for ever, with other groups of requests and
another throughput: eight requests on three stages went round as three, three and two with 59 tokens/s, or as four and
four with 51. Which way a server takes is chance, so what is reported is the mean over several seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from helixbench.solver.expected.analytic import predict_analytically
from helixbench.solver.expected.batch_limits import Batching, best_batching
from helixbench.solver.flow.max_flow import Flow
from helixbench.solver.flow.pipelines import pipelines_of
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Expected, LayerRange
from helixbench.solver.simulation.closed_loop import (
    FEWEST_REQUESTS,
    MIN_REQUESTS,
    TOKENS_PER_EVENT,
    ClosedLoopResult,
    can_admit_longest,
    simulate_closed_loop,
)


@dataclass(frozen=True)
class Effort:
    """How much a simulation may take: work, windows until two agree, requests in each window, and seeds."""

    max_work: int
    max_windows: int = 1
    requests: int = MIN_REQUESTS
    starts: int = 1


RANKED = Effort(max_work=300_000)
"""To compare placements and limits: about a second."""

LIMITED = Effort(max_work=1_500_000)
"""To compare limits alone where requests group so little under them that ``RANKED`` does not see a round: seconds."""

REPORTED = Effort(max_work=2_000_000, max_windows=8, starts=3)
"""For the plan's figure at the concurrency that was asked for: seconds."""

REPORTED_BESIDE = Effort(max_work=1_500_000, max_windows=8, starts=3)
"""The same where the question was about the flow."""

STEP = Effort(max_work=150_000, requests=288)
"""For the plan's figures at lower concurrency: over more requests, for with fewer the last 3 % are left to chance."""

MAX_CHOICES = 2_000_000
"""Requests in flight times pipelines to choose from; beyond it, analytically."""

MAX_IN_FLIGHT = 5_000
"""Requests; beyond it, analytically."""

EVENTS_PER_ITERATION = 4
HOPELESS = 4
"""Times the work allowed: a simulation that would need more if its requests never grouped is not tried."""

BATCHINGS_TRIED = 8
"""Limits on iterations that a thorough comparison tries, at least."""

THOROUGH_WORK = 1_500_000
"""The comparison is thorough where all of it is expected to take so much work at most."""

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
    names = each[0].node_busy
    return ClosedLoopResult(
        expected=msgspec.structs.replace(
            each[0],
            total_tokens_per_s=statistics.fmean(one.total_tokens_per_s for one in each),
            output_tokens_per_s=statistics.fmean(one.output_tokens_per_s for one in each),
            ttft_s=_mean(one.ttft_s for one in each),
            tpot_s=_mean(one.tpot_s for one in each),
            low_total_tokens_per_s=_mean(one.low_total_tokens_per_s for one in each),
            high_total_tokens_per_s=_mean(one.high_total_tokens_per_s for one in each),
            node_busy={name: statistics.fmean(one.node_busy[name] for one in each) for name in names},
            node_batch_tokens={name: statistics.fmean(one.node_batch_tokens[name] for one in each) for name in names},
        ),
        is_settled=all(one.is_settled for one in found),
        rounds=statistics.fmean(one.rounds for one in found),
        work=sum(one.work for one in found),
        totals=tuple(one.expected.total_tokens_per_s for one in found),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class BestLimits:
    """Limits on iterations, what is expected under them, and about how much work it was to find them."""

    batching: Batching
    expected: Expected
    work: int


def best_limits(
    capacities: Capacities, placement: Mapping[str, LayerRange], flow: Flow, *, thorough: bool, effort: Effort = RANKED
) -> BestLimits | None:
    """The limits on iterations that bring the most; ``None`` where the effort is too little to simulate them.

    Limits decide by up to a factor of three what a long pipeline delivers. So a placement that can be simulated within
    the effort without limits only counts as not simulated: its figure is not comparable with those of others.
    """
    held, concurrency = flow.used(placement), capacities.concurrency
    unlimited = simulated(capacities, held, flow, concurrency, effort=effort)
    if unlimited is None:
        return None
    sizes = [max_batch_tokens(capacities, name) for name in held]
    if None in sizes:  # a table's largest batch is part of what the table means
        return BestLimits(NO_LIMITS, unlimited.expected, unlimited.work)
    thorough = thorough and BATCHINGS_TRIED * unlimited.work <= THOROUGH_WORK

    def expected_under(batching: Batching) -> Expected | None:
        if batching == NO_LIMITS:
            return unlimited.expected
        found = simulated(capacities, held, flow, concurrency, batching=batching, effort=effort)
        return None if found is None else found.expected

    def settled_under(batching: Batching) -> Expected:
        return expected_of(capacities, held, flow, concurrency, batching=batching, effort=REPORTED)

    found = best_batching(
        expected_under,
        in_flight=unlimited.expected.concurrency,
        stages=max(len(pipeline) for pipeline, _ in pipelines_of(held, flow.links)),
        mix=capacities.mix,
        max_batch_tokens=max(size or 0 for size in sizes),
        thorough=thorough,
        settled_under=settled_under if thorough else None,
    )
    return None if found is None else BestLimits(*found, BATCHINGS_TRIED // 2 * unlimited.work)


def max_batch_tokens(capacities: Capacities, name: str, batching: Batching = NO_LIMITS) -> int | None:
    """Tokens of a node's largest iteration under those limits; ``None`` where it was not measured."""
    cost = capacities.nodes[name].cost
    if cost is None:
        return None
    return min(cost.max_batch_tokens, batching.max_batch_tokens or cost.max_batch_tokens)
