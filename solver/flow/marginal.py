"""What a little more, or a little less, of each bottleneck is worth, and what one more node would add.

The first holds the placement and solves its max-flow again with one resource changed: duals alone would credit one of
several bottlenecks in a row with what only all of them together give. The second is a search of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

from helixbench.profiler.cluster import ClusterProfile
from helixbench.solver.flow.max_flow import Flow, solve_network
from helixbench.solver.flow.network import Network, Resource, ResourceKind
from helixbench.solver.problem.plan import Infeasible, Marginal, OneMore, Plan
from helixbench.solver.questions.what_if import with_nodes

STEP = 0.01
"""Of a resource: how much more and less of it is tried."""

FULL = 1e-6
"""Relative: a resource used up to this is full."""

MAX_WORK = 6e6
"""Of all the max-flows that are solved for one plan's marginal values, as ``work_of`` counts: about a second's."""

ResourceName = tuple[ResourceKind, str]


def full_resources(network: Network, flow: Flow) -> list[Resource]:
    """The resources that the flow uses up, those with the largest share of the min cut first."""
    amounts = {(link.src, link.dst): link.flow_tokens_per_s for link in flow.links}
    on_arc = [amounts.get((arc.src, arc.dst), 0.0) for arc in network.arcs]
    full = [r for r in network.resources if sum(share * on_arc[arc] for arc, share in r.use) >= 1 - FULL]
    shares = {(share.kind, share.name): share.tokens_per_s for share in flow.cut}
    return sorted(full, key=lambda r: (-shares.get((r.kind, r.name), 0.0), r.kind, r.name))


def flow_with(network: Network, names: Collection[ResourceName], factor: float) -> float:
    """The max-flow with some resources ``factor`` times as large and the placement as it is, tokens/s."""
    resources = tuple(
        dataclasses.replace(r, use=tuple((arc, share / factor) for arc, share in r.use))
        if (r.kind, r.name) in names
        else r
        for r in network.resources
    )
    arcs = tuple(
        dataclasses.replace(arc, capacity_tokens_per_s=arc.capacity_tokens_per_s * factor)
        if ("link", f"{arc.src} -> {arc.dst}") in names
        else arc
        for arc in network.arcs
    )
    return solve_network(dataclasses.replace(network, arcs=arcs, resources=resources)).tokens_per_s


def marginals(network: Network, flow: Flow) -> tuple[Marginal, ...]:
    """What 1 % more and 1 % less of each full resource changes where it changes something.

    As many are tried as ``MAX_WORK`` allows, those with the largest share of the min cut first.
    """
    in_cut = {(share.kind, share.name) for share in flow.cut}
    found: list[Marginal] = []
    for resource in _affordable(network, flow):
        name = (resource.kind, resource.name)
        more = flow_with(network, [name], 1 + STEP) if name in in_cut else flow.tokens_per_s
        less = flow_with(network, [name], 1 - STEP)
        gain, loss = (
            _above_rounding(d, flow.tokens_per_s) for d in (more - flow.tokens_per_s, flow.tokens_per_s - less)
        )
        if gain or loss:
            found.append(
                Marginal(resource=resource.kind, name=resource.name, gain_tokens_per_s=gain, loss_tokens_per_s=loss)
            )
    return tuple(found)


def num_left_out(network: Network, flow: Flow) -> int:
    """How many full resources' marginal values would take too long to work out."""
    return len(full_resources(network, flow)) - len(_affordable(network, flow))


def work_of(network: Network) -> float:
    """What one max-flow takes, in a measure that grows as its time does: faster than its arcs."""
    arcs = len(network.arcs)
    return arcs * math.sqrt(arcs)


def _affordable(network: Network, flow: Flow) -> list[Resource]:
    """The full resources whose marginal values are worked out, those with the largest share of the min cut first."""
    in_cut = {(share.kind, share.name) for share in flow.cut}
    left, chosen = MAX_WORK, []
    for resource in full_resources(network, flow):
        # What no min cut has is worth nothing more of; but less of it may make a cut.
        left -= work_of(network) * (2 if (resource.kind, resource.name) in in_cut else 1)
        if left < 0:
            break
        chosen.append(resource)
    return chosen


def _above_rounding(change: float, of: float) -> float:
    return change if change > FULL * of else 0.0


Solve = Callable[[ClusterProfile, float], Plan | Infeasible]
"""(cluster, seconds) -> answer, by a search that starts from the plan at hand."""


def one_more_of_each(solve: Solve, profile: ClusterProfile, plan: Plan, *, seconds: float) -> Iterator[OneMore]:
    """What one more node of each type of device adds, each by a search of its own; those of the bottleneck first.

    A search that is cut short by time says what it found: more may be possible. Ctrl-C ends with those done.
    """
    devices = _devices(profile, plan)
    before = objective_value(plan)
    for device in devices:
        answer = solve(with_nodes(profile, [f"1x{device}"]), seconds / len(devices))
        if isinstance(answer, Infeasible) or answer.solver.status == "interrupted":
            return
        after = max(before, objective_value(answer))
        yield OneMore(
            device=device,
            tokens_per_s=after,
            gain=after / before - 1,
            is_optimal=answer.solver.status == "optimal" and plan.assumptions.objective == "max-flow",
            seconds=answer.solver.seconds,
        )


def objective_value(plan: Plan) -> float:
    """What the plan's search maximised, tokens/s."""
    if plan.assumptions.objective == "max-flow":
        return plan.predicted.max_flow_tokens_per_s
    return plan.predicted.expected[-1].total_tokens_per_s


def one_more_in_words(found: Sequence[OneMore], objective: Literal["throughput", "max-flow"]) -> Iterator[str]:
    """A line for each type of device."""
    what = "max-flow" if objective == "max-flow" else "expected"
    for more in found:
        if more.gain < FULL:
            added = "nothing" if more.is_optimal else f"nothing that was found in {more.seconds:.1f} s"
            yield f"one more {more.device} adds {added}"
            continue
        least = "" if more.is_optimal or objective == "throughput" else "at least "
        yield f"one more {more.device} adds {least}{more.gain:.1%} ({what} {more.tokens_per_s:.1f} tokens/s)"


def _devices(profile: ClusterProfile, plan: Plan) -> list[str]:
    """Names of the devices that hold layers, full ones first."""
    fullest: dict[str, float] = {}
    for node in profile.nodes:
        if node.name in plan.nodes:
            use = plan.nodes[node.name].flow_tokens_per_s / plan.nodes[node.name].capacity_tokens_per_s
            fullest[node.device.name] = max(fullest.get(node.device.name, 0.0), round(use, 6))
    return sorted(fullest, key=lambda device: (-fullest[device], device))
