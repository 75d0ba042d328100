"""Marginal values: the change of the max-flow with a little more, or a little less, of each bottleneck.

The placement is held and its max-flow solved again with one resource changed: duals alone would credit one of several
bottlenecks in a row with what only all of them together give.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from helixbench.solver.flow.max_flow import Flow, solve_network
from helixbench.solver.flow.network import Network, Resource
from helixbench.solver.problem.plan import Marginal

STEP = 0.01
"""Share of a resource by which it is changed."""

FULL = 1e-6
"""Relative: a resource used up to this is full."""

MAX_WORK = 6e6
"""Limit on all max-flows solved for the marginal values of one plan, as ``work_of`` counts: about a second."""


def full_resources(network: Network, flow: Flow) -> list[Resource]:
    """The resources that the flow uses up, those with the largest share of the min cut first."""
    full = [resource for edge, resource, limit in network.limits() if flow.on_edge[edge] >= limit * (1 - FULL)]
    for mixed in network.mixed:
        if sum(share * flow.on_edge[edge] for edge, share in mixed.use.items()) >= 1 - FULL:
            full.append(mixed.resource)
    shares = {(share.kind, share.name): share.tokens_per_s for share in flow.cut}
    return sorted(full, key=lambda resource: (-shares.get(resource, 0.0), resource))


def flow_with(network: Network, resources: Collection[Resource], factor: float) -> float:
    """The max-flow with some resources ``factor`` times as large and the placement as it is, tokens/s."""
    return solve_network(network.scaled(dict.fromkeys(resources, factor))).tokens_per_s


def marginals(network: Network, flow: Flow) -> tuple[Marginal, ...]:
    """Gain from 1 % more and loss from 1 % less of each full resource, where there is any.

    As many are tried as ``MAX_WORK`` allows, those with the largest share of the min cut first.
    """
    in_cut = {(share.kind, share.name) for share in flow.cut}
    found: list[Marginal] = []
    for resource in _affordable(network, flow):
        more = flow_with(network, [resource], 1 + STEP) if resource in in_cut else flow.tokens_per_s
        less = flow_with(network, [resource], 1 - STEP)
        gain, loss = (
            change if change > FULL * flow.tokens_per_s else 0.0
            for change in (more - flow.tokens_per_s, flow.tokens_per_s - less)
        )
        if gain or loss:
            kind, name = resource
            found.append(Marginal(resource=kind, name=name, gain_tokens_per_s=gain, loss_tokens_per_s=loss))
    return tuple(found)


def num_left_out(network: Network, flow: Flow) -> int:
    """Full resources whose marginal values would take too long to compute."""
    return len(full_resources(network, flow)) - len(_affordable(network, flow))


def work_of(network: Network) -> float:
    """Work of one max-flow, in a unit that grows with its time: faster than the number of edges."""
    edges = network.graph.number_of_edges()
    return edges * math.sqrt(edges)


def _affordable(network: Network, flow: Flow) -> list[Resource]:
    in_cut = {(share.kind, share.name) for share in flow.cut}
    left, chosen = MAX_WORK, []
    for resource in full_resources(network, flow):
        # More of what is in no min cut adds nothing, so only less of it is tried: that may make a cut.
        left -= work_of(network) * (2 if resource in in_cut else 1)
        if left < 0:
            break
        chosen.append(resource)
    return chosen
