"""Expected throughput of a plan's placement after nodes were lost or have changed their speed."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from helixbench.profiler.cluster import ClusterProfile, Node
from helixbench.solver.expected.batch_limits import Batching
from helixbench.solver.expected.simulated import Effort, expected_of
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Expected, Plan

WORK = 500_000
"""Events and tokens of a simulation: about a second."""


def expected_after(
    plan: Plan, profile: ClusterProfile, *, lost: Collection[str], ratios: Mapping[str, float], concurrency: int | None
) -> Expected | None:
    """What the same placement delivers without some of its nodes; ``None`` where those left do not cover the model.

    Args:
        plan: whose placement and limits.
        profile: of the cluster that it was made for.
        lost: nodes that take no requests.
        ratios: node -> factor on the time of its iterations.
        concurrency: requests in flight.
    """
    placement = {node: held for node, held in plan.placement.items() if node not in lost}
    assumed = plan.assumptions
    capacities = Capacities(
        _slowed(profile, ratios), assumed.workload, concurrency=concurrency, partial=assumed.partial_inference
    )
    flow = max_flow(capacities, placement, spread=True)
    if flow.tokens_per_s <= 0:
        return None
    limits = (node.max_batch_tokens for node in plan.nodes.values())
    largest = max((limit for limit in limits if limit is not None), default=None)
    batching = Batching(max_decode_batch=plan.max_decode_batch, max_batch_tokens=largest)
    return expected_of(capacities, placement, flow, concurrency, batching=batching, effort=Effort(max_work=WORK))


def _slowed(cluster: ClusterProfile, ratios: Mapping[str, float]) -> ClusterProfile:
    def slowed(node: Node) -> Node:
        ratio = ratios.get(node.name, 1.0)
        if ratio == 1 or node.cost is None:
            return node
        return msgspec.structs.replace(
            node, cost=msgspec.structs.replace(node.cost, stage=node.cost.stage.scaled(ratio))
        )

    return msgspec.structs.replace(cluster, nodes=tuple(map(slowed, cluster.nodes)))
