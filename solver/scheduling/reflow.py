"""Reflow: the flow of the same placement at the speeds that were measured, and so the weights to route by. Pure.

Nothing is moved: nodes hold the layers that they held. A node that takes ``r`` times its predicted time carries ``1/r``
of its capacity, a link what it was seen to carry, and what is lost, stalled or down carries nothing. The max-flow of
what is left, spread as evenly as the planned one, gives each pipeline its new share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from helixbench.solver.flow.max_flow import solve_network
from helixbench.solver.flow.network import Network, Resource, build_network
from helixbench.solver.flow.pipelines import pipelines_of
from helixbench.solver.flow.spread import cache_shares
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Pipeline

WORTH_CHANGING = 0.05
"""Share of the requests that new weights must send another way, before they replace the old ones."""


@dataclasses.dataclass(frozen=True)
class Observed:
    """What is known of the cluster beside its profile.

    Attributes:
        ratios: node -> measured over predicted iteration time; 1 where missing.
        unusable: nodes that new requests pass over.
        links_down: links that carry nothing, as (from, to).
        link_shares: (from, to) -> share of its profiled bandwidth that a link carries; 1 where missing.
    """

    ratios: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unusable: Collection[str] = ()
    links_down: Collection[tuple[str, str]] = ()
    link_shares: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Weights:
    """What the placement carries now: ``tokens_per_s`` in all, each pipeline with its part, largest first."""

    tokens_per_s: float
    pipelines: tuple[tuple[Pipeline, float], ...]

    def shares(self) -> dict[Pipeline, float]:
        """Pipeline -> share of the requests; empty where nothing flows."""
        total = sum(weight for _, weight in self.pipelines)
        return {pipeline: weight / total for pipeline, weight in self.pipelines} if total > 0 else {}


def reflow(capacities: Capacities, placement: Mapping[str, LayerRange], observed: Observed) -> Weights:
    """The weights of a placement in the cluster as it is; no pipelines where the nodes that are left cover no model."""
    usable = {node: held for node, held in placement.items() if node not in observed.unusable}
    network = _observed(build_network(capacities, usable), observed)
    flow = solve_network(network, shares=cache_shares(capacities, usable))
    return Weights(flow.tokens_per_s, pipelines_of(usable, flow.links))


def is_worth_changing(before: Mapping[Pipeline, float], after: Mapping[Pipeline, float]) -> bool:
    """Whether new shares send more than ``WORTH_CHANGING`` of the requests another way than the old ones did.

    That is the total variation distance of the two: half the sum of the differences.
    """
    differences = (abs(before.get(p, 0.0) - after.get(p, 0.0)) for p in before.keys() | after.keys())
    return sum(differences) / 2 > WORTH_CHANGING


def _observed(network: Network, observed: Observed) -> Network:
    """The network with capacities as they were observed: none on links that are down."""
    factors: dict[Resource, float] = {("node", node): 1.0 / ratio for node, ratio in observed.ratios.items()}
    factors |= {("link", f"{src} -> {dst}"): share for (src, dst), share in observed.link_shares.items()}
    factors |= {("link", f"{src} -> {dst}"): 0.0 for src, dst in observed.links_down}
    return network.scaled(factors)
