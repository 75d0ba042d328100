"""What each routing is for a plan: how the coordinator comes by the pipeline of a request."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping

from helixbench.solver.flow.pipelines import pipelines
from helixbench.solver.problem.plan import Plan
from helixbench.solver.scheduling.hop_routers import HopGraph, RandomRouter, ShortestQueueRouter, SwarmRouter
from helixbench.solver.scheduling.router import Chooser, Router, weighted_pipelines
from helixbench.solver.scheduling.work import Routing


def make_router(
    plan: Plan,
    routing: Routing,
    *,
    seed: int = 0,
    is_connected: Callable[[str | None, str | None], bool] = lambda _src, _dst: True,
) -> Chooser:
    """What chooses pipelines.

    Args:
        plan: its flows are the weights of ``iwrr`` and ``fixed``; the others take its placement alone.
        routing: how.
        seed: of the draws of ``random`` and ``swarm``.
        is_connected: whether work can go from one node to another; ``None`` for the coordinator.
    """
    if routing in ("iwrr", "fixed"):
        return Router(weighted_pipelines(pipelines(plan), routing=routing))
    graph = HopGraph(
        plan.placement,
        num_layers=plan.num_layers,
        partial=plan.assumptions.partial_inference,
        is_connected=is_connected,
    )
    rng = random.Random(f"routing {seed}")
    if routing == "random":
        return RandomRouter(graph, rng)
    return ShortestQueueRouter(graph) if routing == "shortest-queue" else SwarmRouter(graph, rng)


def peers_of(plan: Plan, router: Chooser) -> Mapping[str, frozenset[str]]:
    """Node -> nodes that it may have to send work on to."""
    if not isinstance(router, Router):  # pipelines come up as requests do
        return {node: frozenset(plan.placement) - {node} for node in plan.placement}
    after: dict[str, set[str]] = {node: set() for node in plan.placement}
    for pipeline in router.pipelines:
        for hop, following in itertools.pairwise(pipeline):
            after[hop.node].add(following.node)
    return {node: frozenset(peers) for node, peers in after.items()}
