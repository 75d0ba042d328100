"""Whether the plan is worth its nodes: what one of them gives alone, and what few of them give."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from helixbench.profiler.cluster import ClusterProfile
from helixbench.solver.expected.simulated import NO_LIMITS, REPORTED, best_limits, expected_of
from helixbench.solver.flow.marginal import objective_value
from helixbench.solver.flow.max_flow import largest_flow
from helixbench.solver.problem.plan import Infeasible, LayerRange, Plan
from helixbench.solver.problem.question import Question
from helixbench.solver.questions.what_if import without_nodes

WORTH = 0.95
"""Of the plan's tokens/s: nodes that give as much without the others make these a waste."""

MAX_NAMED = 12

Solve = Callable[[ClusterProfile, float], Plan | Infeasible]
"""(cluster, seconds) -> answer, by a search under the plan's rules."""


def with_verdicts(question: Question, plan: Plan) -> Plan:
    """The plan with a note where one node alone, under its own best limits on iterations, gives nearly as much."""
    note = _one_does_as_well(question, plan)
    if note is None:
        return plan
    assumptions = msgspec.structs.replace(plan.assumptions, notes=(note, *plan.assumptions.notes))
    return msgspec.structs.replace(plan, assumptions=assumptions)


def _one_does_as_well(question: Question, plan: Plan) -> str | None:
    capacities = question.capacities
    if len(plan.placement) < 2:
        return None
    together = plan.predicted.expected[-1].total_tokens_per_s
    whole = LayerRange(0, capacities.model.num_layers)
    seen: set[int] = set()
    best, best_name, batching = 0.0, "", NO_LIMITS
    for name in capacities.nodes:
        if capacities.kind(name) in seen or not capacities.can_hold(name, whole):
            continue
        seen.add(capacities.kind(name))
        flow = largest_flow(question, {name: whole})
        if flow.tokens_per_s < WORTH * together:
            continue  # what is expected never exceeds the max-flow
        limits = best_limits(question, {name: whole}, flow, thorough=False)
        found = limits.expected if limits else expected_of(question, {name: whole}, flow, question.concurrency)
        if found.total_tokens_per_s > best:
            best, best_name = found.total_tokens_per_s, name
            batching = limits.batching if limits else NO_LIMITS
    if best < WORTH * together:
        return None
    # As long as the plan's own requests were followed, for the two figures stand side by side.
    flow = largest_flow(question, {best_name: whole})
    alone = expected_of(
        question, {best_name: whole}, flow, question.concurrency, batching=batching, effort=REPORTED
    ).total_tokens_per_s
    if alone < WORTH * together:
        return None
    return f"not worth distributing: {best_name} alone gives {alone / together:.0%} of it"


def fewer_nodes(solve: Solve, profile: ClusterProfile, plan: Plan, *, seconds: float) -> str | None:
    """A note where fewer nodes give nearly as much as the plan; ``None`` where none were found that do.

    The nodes that do least work in the plan are left out, as many as can be by bisection; each try is a search of its
    own, so more may be possible to leave out than was found.
    """
    names = sorted(
        plan.placement, key=lambda name: -plan.placement[name].num_layers * plan.nodes[name].flow_tokens_per_s
    )
    unused = [node.name for node in profile.nodes if node.name not in plan.placement]
    wanted = WORTH * objective_value(plan)
    low, high = 1, len(names)
    share, tries = 1.0, max(1, high.bit_length())
    while low < high:
        count = (low + high) // 2
        answer = solve(without_nodes(profile, [*unused, *names[count:]]), seconds / tries)
        if isinstance(answer, Plan) and answer.solver.status == "interrupted":
            return None
        if isinstance(answer, Plan) and objective_value(answer) >= wanted:
            share, high = objective_value(answer) / objective_value(plan), count
        else:
            low = count + 1
    if high == len(names):
        return None
    left_out = ", ".join(names[high:][:MAX_NAMED]) + (", ..." if len(names) - high > MAX_NAMED else "")
    return (
        f"not worth distributing over {len(names)} nodes: {high} of them give {share:.0%} of it, "
        f"{left_out} bring next to nothing"
    )
