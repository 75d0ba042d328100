"""Expected throughput over the requests in flight: one curve, each of its points simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from helixbench.solver.expected.analytic import predict_analytically
from helixbench.solver.expected.batch_limits import Batching
from helixbench.solver.expected.simulated import RANKED, REPORTED, STEP, Budget, simulated
from helixbench.solver.flow.max_flow import Flow
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Expected, LayerRange
from helixbench.solver.simulation.closed_loop import ClosedLoopResult

SATURATED = 0.98
"""Share of the throughput at the highest concurrency from which more requests in flight only wait."""

CHANCE = 1.03
"""Starts that differ by more have led to other groups; a point that is above a later one by more is no chance."""

MOST_FOR_ASKED = 0.5
"""Share of the work for the concurrency that was asked for; the rest is for the lower ones."""

ANALYTIC_NOTE = (
    "expected throughput at the highest concurrency is computed analytically and can be a third off: "
    "simulating it takes more than the time limit leaves; give a lower --concurrency or a longer --time-limit-s"
)

UNSETTLED_NOTE = (
    "expected throughput at the highest concurrency is of a short simulation that had not settled, and no lower "
    "one was simulated: give a longer --time-limit-s"
)


def expected_curve(
    capacities: Capacities,
    held: Mapping[str, LayerRange],
    flow: Flow,
    batching: Batching,
    budget: Budget,
    *,
    at_first: Expected | None = None,
) -> tuple[tuple[Expected, ...], tuple[str, ...]]:
    """Expected at 1, 2, 4, ... and at the number asked for, or at what the KV caches admit; and notes.

    The last point comes first; lower ones follow in order, until more requests in flight bring no more or the work is
    used up, and none is there that was not simulated. Throughput never falls along the curve.

    Args:
        capacities: of the nodes, for what was asked.
        held: node -> layer range, for the nodes that the flow uses.
        flow: through them.
        batching: limits on iterations.
        budget: of all simulations; what they take is spent.
        at_first: the last point as it was simulated to choose these limits, where it was.
    """
    asked = capacities.concurrency
    effort = budget.effort(REPORTED, share=MOST_FOR_ASKED)
    found = simulated(capacities, held, flow, asked, batching=batching, effort=effort)
    budget.spend(effort.max_work if found is None else found.work)
    if found is None and at_first is None:  # one look, even where no time is left
        found = simulated(capacities, held, flow, asked, batching=batching, effort=RANKED)
    if found is not None:
        end, notes = found.expected, _notes(found)
    elif at_first is not None:
        end, notes = at_first, [UNSETTLED_NOTE]
    else:
        end, notes = predict_analytically(capacities, held, flow.links, asked), [ANALYTIC_NOTE]
    points: list[Expected] = []
    step = 1
    while step < min(end.concurrency, end.in_flight or end.concurrency):
        effort = budget.effort(STEP)
        at_step = simulated(capacities, held, flow, step, batching=batching, effort=effort)
        if at_step is None:
            budget.spend(effort.max_work)
            break
        budget.spend(at_step.work)
        points.append(at_step.expected)
        if at_step.expected.total_tokens_per_s >= SATURATED * end.total_tokens_per_s:
            break
        step *= 2
    if notes == [ANALYTIC_NOTE] and points:
        end = _no_less(end, points[-1])
    return _rising([*points, end], notes), tuple(notes)


def _no_less(end: Expected, before: Expected) -> Expected:
    """An estimate that is below what fewer requests were simulated to bring is as much as that."""
    if end.total_tokens_per_s >= before.total_tokens_per_s:
        return end
    return msgspec.structs.replace(
        end, total_tokens_per_s=before.total_tokens_per_s, output_tokens_per_s=before.output_tokens_per_s
    )


def _rising(points: Sequence[Expected], notes: list[str]) -> tuple[Expected, ...]:
    """The points with none above a later one; its own simulation stays in the interval of one that was."""
    rising = [points[-1]]
    for point in reversed(points[:-1]):
        after, own = rising[-1], point.total_tokens_per_s
        if own > after.total_tokens_per_s * CHANCE:
            notes.append(
                f"with {point.concurrency} in flight {own:,.4g} tokens/s were simulated, more than with "
                f"{after.concurrency}: serve it with that limit"
            )
        if own > after.total_tokens_per_s:
            point = msgspec.structs.replace(
                point,
                total_tokens_per_s=after.total_tokens_per_s,
                output_tokens_per_s=after.output_tokens_per_s,
                low_total_tokens_per_s=min(point.low_total_tokens_per_s or 0.0, after.total_tokens_per_s),
            )
        rising.append(point)
    return tuple(reversed(rising))


def _notes(found: ClosedLoopResult) -> list[str]:
    notes = []
    if not found.is_settled:
        notes.append(
            f"expected throughput had not settled after {found.rounds:.0f} simulated rounds of all requests in flight"
        )
    low, high = min(found.totals, default=0.0), max(found.totals, default=0.0)
    if high > CHANCE * low:
        notes.append(
            f"expected throughput is the mean of {len(found.totals)} simulations with {low:,.4g} to {high:,.4g} "
            "tokens/s: how requests group depends on how they start"
        )
    return notes
