"""A plan, and what it changes against another one, in a few lines of plain text."""

from __future__ import annotations

from collections.abc import Iterator

from helixbench.profiler.cluster import ClusterProfile
from helixbench.solver.problem.plan import Objective, Plan, Survival
from helixbench.solver.questions.what_if import bytes_to_load

ADMITTED = 0.98
"""Share of the requests in flight that were asked for; if fewer are admitted, the summary says so."""


def summary_lines(plan: Plan) -> Iterator[str]:
    """Placement, bound, bottleneck and expected throughput, for a terminal."""
    predicted, assumed = plan.predicted, plan.assumptions
    yield f"{plan.model}: {plan.num_layers} layers on {len(plan.placement)} nodes, for {assumed.workload.source}"
    survival = predicted.survival
    width = max(len(name) for name in plan.placement)
    for name, held in sorted(plan.placement.items(), key=lambda item: (item[1], item[0])):
        node = plan.nodes[name]
        use = node.flow_tokens_per_s / node.capacity_tokens_per_s
        after = (
            "" if survival is None else f"; {survival.after_loss[name].expected_tokens_per_s:.1f} expected without it"
        )
        yield (
            f"  {name:<{width}}  {held!s:>9}  {node.flow_tokens_per_s:10.1f} of {node.capacity_tokens_per_s:10.1f} "
            f"tokens/s  {use:4.0%}{after}"
        )
    yield (
        f"max-flow {predicted.max_flow_tokens_per_s:.1f} tokens/s, upper bound of any plan "
        f"{predicted.upper_bound_tokens_per_s:.1f} (gap {predicted.gap:.2%}; {plan.solver.status}, "
        f"{plan.solver.seconds:.1f} s)"
    )
    for number, line in enumerate(predicted.bottleneck):
        yield f"{'' if number else 'bottleneck:':<11} {line}"
    for step in predicted.expected:
        low, high = step.low_total_tokens_per_s, step.high_total_tokens_per_s
        span = "" if low is None or high is None else f" ({low:.1f} to {high:.1f})"
        latency = "" if step.tpot_s is None else f", {step.tpot_s * 1000:.1f} ms per output token"
        in_flight = step.in_flight or step.concurrency
        admitted = f", {in_flight:.0f} admitted" if in_flight < ADMITTED * step.concurrency else ""
        at = f"expected at {step.concurrency:5d} in flight:"
        yield f"{at} {step.total_tokens_per_s:10.1f} tokens/s{span}{latency}{admitted}"
    yield from _bounds_of_targets(plan)
    if survival is not None:
        yield _survival_line(survival, what=plan.assumptions.objective)
    for note in assumed.notes:
        yield f"note: {note}"


def _survival_line(survival: Survival, *, what: Objective) -> str:
    flows = [after.max_flow_tokens_per_s for after in survival.after_loss.values()]
    line = f"after the loss of any one node: max-flow {min(flows):.1f} tokens/s or more"
    if survival.price_tokens_per_s is None:
        return line
    return (
        f"{line}; this costs {survival.price_tokens_per_s:.1f} tokens/s of {what}, "
        f"in any plan at least {survival.least_price_tokens_per_s or 0.0:.1f}"
    )


def _bounds_of_targets(plan: Plan) -> Iterator[str]:
    """The proven bounds on expected throughput, latency and the number of nodes."""
    predicted = plan.predicted
    bound = predicted.bound_of_expected
    if bound is not None and plan.assumptions.objective == "throughput":
        asked = predicted.expected[-1].total_tokens_per_s
        yield (
            f"bounds of any plan with {bound.in_flight} in flight: at most {bound.tokens_per_s:.1f} tokens/s expected "
            f"(gap {bound.tokens_per_s / asked - 1:.1%}), at least {bound.least_tpot_s * 1000:.1f} ms per output token"
        )
    if predicted.least_nodes is not None:
        yield f"bound of any plan with the tokens/s asked for: at least {predicted.least_nodes} nodes"


def difference_lines(profile: ClusterProfile, before: Plan, after: Plan) -> Iterator[str]:
    """Differences between two plans: ranges, bytes to load, tokens/s."""
    names = [n for n in {**before.placement, **after.placement} if before.placement.get(n) != after.placement.get(n)]
    in_order = sorted(names, key=lambda name: (after.placement.get(name) or before.placement[name], name))
    loads = {
        name: bytes_to_load(profile.model, before.placement.get(name), after.placement.get(name)) for name in in_order
    }
    width = max(map(len, names), default=0)
    for name, load in loads.items():
        old, new = before.placement.get(name), after.placement.get(name)
        yield f"  {name:<{width}}  {old or 'unused'!s:>9} -> {new or 'unused'!s:<9}  {load / 1e9:6.2f} GB to load"
    kept = sum(held == after.placement.get(name) for name, held in before.placement.items())
    yield f"  {len(names)} nodes change, {kept} stay as they are; {sum(loads.values()) / 1e9:.2f} GB to load in all"
    was, now = before.predicted, after.predicted
    for label, old_value, new_value in (
        ("max-flow", was.max_flow_tokens_per_s, now.max_flow_tokens_per_s),
        ("expected", was.expected[-1].total_tokens_per_s, now.expected[-1].total_tokens_per_s),
    ):
        change = new_value - old_value
        yield f"  {label}: {old_value:.1f} -> {new_value:.1f} tokens/s, {change:+.1f} ({change / old_value:+.1%})"
