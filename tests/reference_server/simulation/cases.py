"""Small clusters and plans to simulate."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from helixbench.profiler.cluster import COORDINATOR, ClusterProfile, Coordinator, DefaultLink, Link
from helixbench.reference_server.simulation import Arrivals, SimulationConfig
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import (
    Assumptions,
    Expected,
    LayerRange,
    LinkFlow,
    NodeFlow,
    Plan,
    Predicted,
    SolverFacts,
)
from helixbench.solver.problem.workload import Workload, fixed_workload
from tests.solver.clusters import cost_node, model

WORKLOAD = fixed_workload(prompt_tokens=40, output_tokens=12)
MIXED = Workload(source="mixed", lengths=((5, 3), (40, 12), (90, 1), (17, 25)))

CLOSED = Arrivals(kind="closed loop")
OFFLINE = Arrivals(kind="offline")


def cluster(
    speeds: Mapping[str, float],
    *,
    num_layers: int = 8,
    memory_bytes: float = 1e9,
    links: Sequence[Link] = (),
    coordinator: Coordinator | None = None,
    latency_s: float = 1e-3,
) -> ClusterProfile:
    """Measured nodes of these speeds."""
    return ClusterProfile(
        model=model(num_layers),
        nodes=tuple(
            cost_node(
                name,
                speed=speed,
                max_layers=num_layers,
                memory_bytes=memory_bytes,
                nic_out_bytes_per_s=1e8,
                nic_in_bytes_per_s=1e8,
            )
            for name, speed in speeds.items()
        ),
        links=tuple(links),
        default_link=DefaultLink(1e7, latency_s),
        coordinator=coordinator or Coordinator(message_s=1e-4, token_s=2e-5, request_s=3e-5),
    )


def plan_of(
    profile: ClusterProfile,
    placement: Mapping[str, tuple[int, int]],
    paths: Sequence[tuple[Sequence[str], float]],
    *,
    workload: Workload = WORKLOAD,
    expected: tuple[Expected, ...] = (),
    concurrency: int | None = None,
) -> Plan:
    """A plan that sends that much flow over those paths; what it promises means nothing."""
    ranges = {node: LayerRange(*held) for node, held in placement.items()}
    capacities = Capacities(profile, workload)
    through: dict[str, float] = dict.fromkeys(placement, 0.0)
    over: dict[tuple[str, str], float] = {}
    for nodes, flow in paths:
        for node in nodes:
            through[node] += flow
        for link in itertools.pairwise((COORDINATOR, *nodes, COORDINATOR)):
            over[link] = over.get(link, 0.0) + flow
    total = sum(flow for _, flow in paths)
    return Plan(
        model=profile.model.name,
        num_layers=profile.model.num_layers,
        placement=ranges,
        flows=tuple(
            LinkFlow(src=src, dst=dst, flow_tokens_per_s=flow, capacity_tokens_per_s=1e9)
            for (src, dst), flow in over.items()
        ),
        nodes={
            node: NodeFlow(
                flow_tokens_per_s=flow,
                capacity_tokens_per_s=1e6,
                kv_capacity_tokens=capacities.kv_tokens(node, ranges[node]),
                max_batch_tokens=64,
            )
            for node, flow in through.items()
        },
        predicted=Predicted(max_flow_tokens_per_s=total, upper_bound_tokens_per_s=total, gap=0.0, expected=expected),
        assumptions=Assumptions(
            workload=workload, partial_inference=True, objective="throughput", concurrency=concurrency
        ),
        solver=SolverFacts(method="by hand", backend="none", seconds=0.0, status="not searched"),
    )


def two_in_a_row() -> tuple[ClusterProfile, Plan]:
    """A fast and a slow node, one pipeline."""
    profile = cluster({"a": 2.0, "b": 1.0})
    return profile, plan_of(profile, {"a": (0, 5), "b": (5, 8)}, [(["a", "b"], 100.0)])


def four_nodes(*, memory_bytes: float = 1e9) -> tuple[ClusterProfile, Plan]:
    """Several pipelines, one of which enters a range late."""
    profile = cluster({"a": 2.0, "b": 1.0, "c": 0.7, "d": 1.5}, memory_bytes=memory_bytes)
    placement = {"a": (0, 4), "b": (2, 8), "c": (0, 2), "d": (3, 8)}
    return profile, plan_of(profile, placement, [(["a", "b"], 2.0), (["c", "b"], 1.0), (["a", "d"], 1.0)])


def closed(
    concurrency: int, *, workload: Workload = WORKLOAD, num_requests: int = 60, **fields: object
) -> SimulationConfig:
    """A closed loop."""
    return SimulationConfig(
        workload=workload,
        arrivals=CLOSED,
        concurrency=concurrency,
        num_requests=num_requests,
        duration_s=None,
        warmup_s=0.0,
        **fields,  # type: ignore[arg-type]
    )
