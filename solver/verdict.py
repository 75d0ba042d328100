"""Whether the plan is worth its nodes: what one of them gives alone, and what few of them give."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from profiler.cluster_profile import ClusterProfile

from .following import Question, carrying, expected_of
from .marginal import objective_value
from .plan import Infeasible, LayerRange, Plan
from .whatif import without_nodes

WORTH = 0.95
"""Of the plan's tokens/s: nodes that give as much without the others make these a waste."""

MAX_NAMED = 12

Solve = Callable[[ClusterProfile, float], Plan | Infeasible]
"""(cluster, seconds) -> answer, by a search under the plan's rules."""


def verdicts(question: Question, placement: Mapping[str, LayerRange]) -> tuple[str, ...]:
    """A note where one node alone gives nearly as much as the plan."""
    capacities = question.capacities
    if len(placement) < 2:
        return ()
    whole = LayerRange(0, capacities.model.num_layers)
    seen: set[int] = set()
    alone: list[tuple[float, str]] = []
    for name in capacities.nodes:
        if capacities.kind(name) in seen or not capacities.can_hold(name, whole):
            continue
        seen.add(capacities.kind(name))
        flow = carrying(question, {name: whole})
        if flow.tokens_per_s > 0:
            expected = expected_of(question, {name: whole}, flow, question.concurrency)
            alone.append((expected.total_tokens_per_s, name))
    if not alone:
        return ()
    together = expected_of(question, placement, carrying(question, placement, spread=True), question.concurrency)
    if max(alone)[0] < WORTH * together.total_tokens_per_s:
        return ()
    tokens_per_s, name = max(alone)
    return (f"not worth distributing: {name} alone gives {tokens_per_s / together.total_tokens_per_s:.0%} of it",)


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
