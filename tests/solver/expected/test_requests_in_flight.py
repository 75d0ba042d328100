"""Requests in flight bound throughput: published24 with lengths of real conversations."""

from __future__ import annotations

import pytest

from helixbench.profiler.cluster import ClusterProfile
from helixbench.profiler.import_tables import with_imported_costs
from helixbench.solver import Plan, SolveConfig, Workload, solve_placement, trace_workload
from helixbench.solver.expected.analytic import predict_analytically
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Placement
from tests.solver.clusters import DATA, published


@pytest.fixture(scope="module")
def cluster() -> ClusterProfile:
    return published("published24-llama70b")


@pytest.fixture(scope="module")
def conversations() -> Workload:
    """Lengths as the published study took them: prompts up to 2048 tokens, outputs up to 1024."""
    whole = trace_workload(DATA / "azure_llm_2023_conv.csv")
    return Workload(source=whole.source, lengths=tuple(x for x in whole.lengths if x[0] <= 2048 and x[1] <= 1024))


def chain(cluster: ClusterProfile, **stages: tuple[tuple[int, int], ...]) -> Placement:
    """Stages of (nodes side by side, layers) for each device, one after another."""
    placement: Placement = {}
    reached = 0
    for device, shapes in stages.items():
        left = [node.name for node in cluster.nodes if node.device.name.lower() == device]
        for width, layers in shapes:
            for name in left[:width]:
                placement[name] = LayerRange(reached, reached + layers)
            left, reached = left[width:], reached + layers
    assert reached == cluster.model.num_layers
    return placement


def plans(cluster: ClusterProfile) -> dict[str, Placement]:
    return {
        "balanced": chain(cluster, a100=((1, 7),) * 4, l4=((1, 4),) * 8, t4=((1, 2),) * 8 + ((2, 2),) * 2),
        "flow-optimal": chain(cluster, a100=((1, 8),) * 4, l4=((1, 3),) * 8, t4=((1, 2),) * 12),
        "wide": chain(cluster, a100=((1, 8),) * 4, l4=((2, 6),) * 4, t4=((2, 4),) * 6),
    }


def test_the_chain_that_fills_evenly_admits_the_most(cluster: ClusterProfile, conversations: Workload) -> None:
    capacities = Capacities(cluster, conversations)
    flows, expected = {}, {}
    for name, placement in plans(cluster).items():
        flow = max_flow(capacities, placement, spread=True)
        flows[name] = flow.tokens_per_s
        expected[name] = predict_analytically(capacities, placement, flow.links, None)
    assert flows["flow-optimal"] == pytest.approx(2045.64, abs=0.01)
    assert flows["wide"] == pytest.approx(1495.6, abs=0.1)
    assert flows["balanced"] == pytest.approx(1476.1, abs=0.1)
    in_flight = {name: of.in_flight or 0.0 for name, of in expected.items()}
    assert in_flight["balanced"] > 1.2 * in_flight["flow-optimal"]
    assert in_flight["flow-optimal"] == in_flight["wide"]  # that of an A100 with eight layers
    assert all(0.9 * flows[name] < of.total_tokens_per_s <= flows[name] for name, of in expected.items())


def test_the_search_finds_a_plan_at_least_as_good_as_the_one_made_by_hand(
    cluster: ClusterProfile, conversations: Workload
) -> None:
    capacities = Capacities(cluster, conversations)
    by_hand = plans(cluster)["balanced"]
    flow = max_flow(capacities, by_hand, spread=True)
    plan = solve_placement(SolveConfig(cluster=cluster, workload=conversations, time_limit_s=15))
    assert isinstance(plan, Plan)
    found = predict_analytically(capacities, plan.placement, plan.flows, None).total_tokens_per_s
    assert found >= predict_analytically(capacities, by_hand, flow.links, None).total_tokens_per_s * (1 - 1e-6)
    assert plan.predicted.expected[-1].total_tokens_per_s == pytest.approx(found, rel=0.05)  # simulated


def test_imported_timings_fit_within_a_tenth(cluster: ClusterProfile) -> None:
    imported = with_imported_costs(cluster, DATA / "gpu_profiles")
    for node in imported.nodes:
        assert node.cost is not None
        assert node.cost.held_out_error_median < 0.1
        assert "one decoder layer" in node.cost.source
        assert node.cost.stage.step_s < 1e-9
