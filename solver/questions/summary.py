"""A plan in a few lines of plain text."""

from __future__ import annotations

from collections.abc import Iterator

from helixbench.solver.problem.plan import Plan


def summary_lines(plan: Plan) -> Iterator[str]:
    """Placement, bound, bottleneck and expected throughput, for a terminal."""
    predicted, assumed = plan.predicted, plan.assumptions
    yield f"{plan.model}: {plan.num_layers} layers on {len(plan.placement)} nodes, for {assumed.workload.source}"
    width = max(len(name) for name in plan.placement)
    for name, held in sorted(plan.placement.items(), key=lambda item: (item[1], item[0])):
        node = plan.nodes[name]
        use = node.flow_tokens_per_s / node.capacity_tokens_per_s
        yield (
            f"  {name:<{width}}  {held!s:>9}  {node.flow_tokens_per_s:10.1f} of {node.capacity_tokens_per_s:10.1f} "
            f"tokens/s  {use:4.0%}"
        )
    yield (
        f"max-flow {predicted.max_flow_tokens_per_s:.1f} tokens/s, no plan's can pass "
        f"{predicted.upper_bound_tokens_per_s:.1f} (gap {predicted.gap:.2%}; {plan.solver.status}, "
        f"{plan.solver.seconds:.1f} s)"
    )
    for number, line in enumerate(predicted.bottleneck):
        yield f"{'' if number else 'bottleneck:':<11} {line}"
    for step in predicted.expected:
        latency = "" if step.tpot_s is None else f", {step.tpot_s * 1000:.1f} ms per output token"
        yield f"expected at {step.concurrency:5d} in flight: {step.total_tokens_per_s:10.1f} tokens/s{latency}"
    yield from _bounds_of_targets(plan)
    for note in assumed.notes:
        yield f"note: {note}"


def _bounds_of_targets(plan: Plan) -> Iterator[str]:
    """What the proven bounds bound: expected throughput, latency, nodes."""
    predicted = plan.predicted
    bound = predicted.bound_of_expected
    if bound is not None and plan.assumptions.objective == "throughput":
        asked = predicted.expected[-1].total_tokens_per_s
        yield (
            f"no plan can be expected to give more than {bound.tokens_per_s:.1f} tokens/s with {bound.in_flight} "
            f"in flight (gap {bound.tokens_per_s / asked - 1:.1%}), nor take less than "
            f"{bound.least_tpot_s * 1000:.1f} ms per output token"
        )
    if predicted.least_nodes is not None:
        yield f"no plan with so many tokens/s has fewer than {predicted.least_nodes} nodes"
