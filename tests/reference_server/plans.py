"""Plans made by hand, for agents that run already."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from helixbench.profiler.cluster import COORDINATOR
from helixbench.profiler.model.model import open_model
from helixbench.solver.problem.plan import Assumptions, LayerRange, LinkFlow, NodeFlow, Plan, Predicted, SolverFacts
from helixbench.solver.problem.workload import Workload, fixed_workload

MAX_BATCH_TOKENS = 24  # small: prompts are cut into chunks, and chunks run beside decodes
KV_CAPACITY_TOKENS = 4096

Path_ = tuple[Sequence[str], float]  # (nodes in order, share of the flow)


def make_plan(
    model: Path,
    placement: Mapping[str, tuple[int, int]],
    paths: Sequence[Path_],
    *,
    kv_capacity_tokens: int | None = KV_CAPACITY_TOKENS,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    workload: Workload | None = None,
) -> Plan:
    """A plan that sends that much flow over those paths; what it predicts means nothing."""
    files = open_model(str(model))
    through: dict[str, float] = dict.fromkeys(placement, 0.0)
    over: dict[tuple[str, str], float] = {}
    for nodes, flow in paths:
        for node in nodes:
            through[node] += flow
        for link in itertools.pairwise((COORDINATOR, *nodes, COORDINATOR)):
            over[link] = over.get(link, 0.0) + flow
    total = sum(flow for _, flow in paths)
    return Plan(
        model=model.name,
        num_layers=files.num_layers,
        placement={node: LayerRange(*held) for node, held in placement.items()},
        flows=tuple(
            LinkFlow(src=src, dst=dst, flow_tokens_per_s=flow, capacity_tokens_per_s=1e9)
            for (src, dst), flow in over.items()
        ),
        nodes={
            node: NodeFlow(
                flow_tokens_per_s=flow,
                capacity_tokens_per_s=1e6,
                kv_capacity_tokens=kv_capacity_tokens,
                max_batch_tokens=max_batch_tokens,
                region=f"place of {node}",
            )
            for node, flow in through.items()
        },
        predicted=Predicted(max_flow_tokens_per_s=total, upper_bound_tokens_per_s=total, gap=0.0),
        assumptions=Assumptions(
            workload=workload or fixed_workload(prompt_tokens=16, output_tokens=8),
            partial_inference=True,
            objective="throughput",
            concurrency=4,
        ),
        solver=SolverFacts(method="by hand", backend="none", seconds=0.0, status="not searched"),
        model_digest=files.digest(),
        dtype="float32",
    )


ONE_NODE = ({"n0": (0, 6)}, [(["n0"], 1.0)])
THREE_IN_A_ROW = ({"n0": (0, 2), "n1": (2, 4), "n2": (4, 6)}, [(["n0", "n1", "n2"], 1.0)])
TWO_PIPELINES = (
    {"n0": (0, 3), "n1": (3, 6), "n2": (0, 2), "n3": (2, 6)},
    [(["n0", "n1"], 2.0), (["n2", "n3"], 1.0)],
)
# n1 runs, in one batch, sequences that enter at its first layer (from n2) and two layers later (from n0)
OVERLAPPING = (
    {"n0": (0, 4), "n1": (2, 6), "n2": (0, 2), "n3": (3, 6)},
    [(["n0", "n1"], 2.0), (["n2", "n1"], 1.0), (["n0", "n3"], 1.0)],
)
PLANS = {
    "one node": ONE_NODE,
    "three in a row": THREE_IN_A_ROW,
    "two pipelines": TWO_PIPELINES,
    "partial inference": OVERLAPPING,
}
