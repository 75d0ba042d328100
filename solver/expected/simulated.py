"""How far the requests of a placement are followed to say what it delivers, and under which limits on iterations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from helixbench.solver.expected.analytic import predict_means
from helixbench.solver.expected.batch_limits import Batching, best_batching
from helixbench.solver.expected.starts import follow_from
from helixbench.solver.flow.max_flow import Flow
from helixbench.solver.flow.pipelines import pipelines_of
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Expected, LayerRange
from helixbench.solver.problem.question import Question
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
    """How long a rollout goes on: windows of at least so many rounds and requests, until two agree or it is cut off.

    It is followed from so many ``starts`` (``starts``), where ``max_work`` allows for that.
    """

    max_work: int
    max_windows: int = 1
    requests: int = MIN_REQUESTS
    starts: int = 1


RANKED = Effort(max_work=300_000)
"""To compare placements and limits: about a second."""

LIMITED = Effort(max_work=1_500_000)
"""To compare limits alone where requests gather so little under them that ``RANKED`` does not see a round: seconds."""

REPORTED = Effort(max_work=2_000_000, max_windows=8, starts=3)
"""What is reported for the requests in flight that were asked for: seconds."""

REPORTED_BESIDE = Effort(max_work=1_500_000, max_windows=8, starts=3)
"""The same where the flow was asked for."""

STEP = Effort(max_work=150_000, requests=288)
"""What is reported for fewer in flight: over more requests, for with fewer the last 3 % are left to chance."""

MAX_CHOICES = 2_000_000
"""Requests in flight times pipelines to choose from; above it means alone are used."""

EVENTS_PER_ITERATION = 4
HOPELESS = 4
"""Times the work allowed: a rollout that would need more if its requests never gathered is not tried."""

THOROUGH_WORK = 1_500_000
"""All limits on iterations are tried where the rollouts together take so much work at most."""

MAX_IN_FLIGHT = 5_000
"""Requests; above it means alone are used."""

BATCHINGS_TRIED = 8
"""So many rollouts are tried then, at least."""

NO_LIMITS = Batching()


def expected_of(
    question: Question,
    placement: Mapping[str, LayerRange],
    flow: Flow,
    concurrency: int | None,
    *,
    batching: Batching = NO_LIMITS,
    effort: Effort = RANKED,
) -> Expected:
    """What the placement will deliver with so many requests in flight, routed by that flow.

    Requests are followed iteration by iteration where the effort allows it, and taken by their means where it does not.
    """
    held = flow.used(placement)
    rolled = follow(question, held, flow, concurrency, batching=batching, effort=effort)
    if rolled is not None:
        return rolled.expected
    return predict_means(question.capacities, held, flow.links, concurrency)


def follow(
    question: Question,
    held: Mapping[str, LayerRange],
    flow: Flow,
    concurrency: int | None,
    *,
    batching: Batching = NO_LIMITS,
    effort: Effort = RANKED,
) -> ClosedLoopResult | None:
    """The rollout of a placement that its flow uses; ``None`` where it is out of reach."""
    if not is_followed(question, held, flow, concurrency, effort=effort):
        return None

    def roll(seed: int) -> ClosedLoopResult | None:
        return simulate_closed_loop(
            question.capacities,
            held,
            flow.links,
            concurrency,
            max_decode_batch=batching.max_decode_batch,
            max_batch_tokens=batching.max_batch_tokens,
            min_requests=effort.requests if len(question.capacities.workload.lengths) > 1 else 0,
            max_windows=effort.max_windows,
            max_work=effort.max_work,
            seed=seed,
        )

    return follow_from(roll, starts=effort.starts, max_work=effort.max_work)


def is_followed(
    question: Question,
    held: Mapping[str, LayerRange],
    flow: Flow,
    concurrency: int | None,
    *,
    effort: Effort = RANKED,
) -> bool:
    """Whether a rollout is worth trying: every request fits, and two rounds are not hopelessly many events.

    So many are expected where requests spread evenly over the stages; groups that merge need far fewer.
    """
    capacities = question.capacities
    if not can_admit_longest(capacities, held, flow.links):
        return False
    in_flight = predict_means(capacities, held, flow.links, concurrency).in_flight or 1.0
    weighted = pipelines_of(held, flow.links)
    if in_flight > MAX_IN_FLIGHT or in_flight * len(weighted) > MAX_CHOICES:
        return False
    stages = sum(len(hops) * share for hops, share in weighted) / sum(share for _, share in weighted)
    requests = in_flight + max(in_flight, FEWEST_REQUESTS)
    visits = requests * capacities.mix.output_tokens * stages
    events = EVENTS_PER_ITERATION * visits / max(1.0, in_flight / stages)
    tokens = requests * capacities.mix.output_tokens
    return events <= HOPELESS * effort.max_work and tokens <= TOKENS_PER_EVENT * effort.max_work


@dataclass(frozen=True)
class BestLimits:
    """Limits on iterations, what is expected under them, and about how much work it was to find them."""

    batching: Batching
    expected: Expected
    work: int


def best_limits(
    question: Question, placement: Mapping[str, LayerRange], flow: Flow, *, thorough: bool, effort: Effort = RANKED
) -> BestLimits | None:
    """The limits on iterations that bring the most; ``None`` where requests are not followed.

    Limits decide by up to a factor of three what a long pipeline delivers. So a placement of which only the rollout
    without limits is within the effort counts as not followed: its figure says nothing beside those of others.
    """
    held = flow.used(placement)
    concurrency = question.concurrency
    unlimited = follow(question, held, flow, concurrency, effort=effort)
    if unlimited is None:
        return None
    sizes = [max_batch_tokens(question.capacities, name) for name in held]
    if None in sizes:  # a table's largest batch is part of what the table means
        return BestLimits(NO_LIMITS, unlimited.expected, unlimited.work)
    known = unlimited.expected
    thorough = thorough and BATCHINGS_TRIED * unlimited.work <= THOROUGH_WORK

    def follow_with(batching: Batching) -> Expected | None:
        if batching == NO_LIMITS:
            return known
        rolled = follow(question, held, flow, concurrency, batching=batching, effort=effort)
        return None if rolled is None else rolled.expected

    found = best_batching(
        follow_with,
        in_flight=known.concurrency,
        stages=max(len(pipeline) for pipeline, _ in pipelines_of(held, flow.links)),
        mix=question.capacities.mix,
        max_batch_tokens=max(size or 0 for size in sizes),
        thorough=thorough,
        follow_longer=(
            (lambda batching: expected_of(question, held, flow, concurrency, batching=batching, effort=REPORTED))
            if thorough
            else None
        ),
    )
    return None if found is None else BestLimits(*found, BATCHINGS_TRIED // 2 * unlimited.work)


def max_batch_tokens(capacities: Capacities, name: str, batching: Batching = NO_LIMITS) -> int | None:
    """Tokens of a node's largest iteration under those limits; ``None`` where it was not measured."""
    cost = capacities.nodes[name].cost
    if cost is None:
        return None
    return min(cost.max_batch_tokens, batching.max_batch_tokens or cost.max_batch_tokens)
