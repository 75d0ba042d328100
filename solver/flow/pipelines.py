"""Pipelines of a plan: its flows taken apart into whole paths, each with its share of the flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.problem.plan import Hop, LayerRange, LinkFlow, Pipeline, Plan

SMALLEST_SHARE = 1e-6
"""Share of the plan's flow below which a path is a rounding error and no pipeline."""


def pipelines(plan: Plan) -> tuple[tuple[Pipeline, float], ...]:
    """Every pipeline of the plan with its tokens/s, largest first."""
    return pipelines_of(plan.placement, plan.flows)


def pipelines_of(placement: Mapping[str, LayerRange], flows: Sequence[LinkFlow]) -> tuple[tuple[Pipeline, float], ...]:
    """Every pipeline of flows over a placement with its tokens/s, largest first.

    Each path found takes the link with the most flow left at every step, and empties at least one link: there are at
    most as many pipelines as links. The same plan gives the same pipelines.
    """
    left: dict[str, dict[str, float]] = {}  # src -> dst -> flow not yet taken
    for flow in sorted(flows, key=lambda f: (f.src, f.dst)):
        if flow.flow_tokens_per_s > 0:
            left.setdefault(flow.src, {})[flow.dst] = flow.flow_tokens_per_s
    total = sum(left.get(COORDINATOR, {}).values())
    found: dict[Pipeline, float] = {}
    while sum(left.get(COORDINATOR, {}).values()) > SMALLEST_SHARE * total:
        nodes = _fullest_path(left)
        if nodes is None:
            break
        links = list(zip((COORDINATOR, *nodes), (*nodes, COORDINATOR), strict=True))
        share = min(left[src][dst] for src, dst in links)
        for src, dst in links:
            left[src][dst] -= share
            if left[src][dst] <= SMALLEST_SHARE * SMALLEST_SHARE * total:
                del left[src][dst]
        if share > SMALLEST_SHARE * total:
            pipeline = _as_pipeline(placement, nodes)
            found[pipeline] = found.get(pipeline, 0.0) + share
    return tuple(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _fullest_path(left: dict[str, dict[str, float]]) -> list[str] | None:
    """Nodes of a path from the coordinator back to it along the fullest links; ``None`` where rounding ended it."""
    nodes: list[str] = []
    here = COORDINATOR
    while True:
        onward = left.get(here)
        if not onward:
            return None
        here = max(sorted(onward), key=lambda dst: onward[dst])
        if here == COORDINATOR:
            return nodes
        nodes.append(here)


def _as_pipeline(placement: Mapping[str, LayerRange], nodes: list[str]) -> Pipeline:
    hops: list[Hop] = []
    reached = 0
    for node in nodes:
        hops.append(Hop(node, reached, placement[node].end))
        reached = placement[node].end
    return tuple(hops)
