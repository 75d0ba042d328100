"""The published formulation finds what the search finds where it knows of all that binds; its bound holds there."""

from __future__ import annotations

import pytest

from helixbench.profiler.cluster import ClusterProfile, DefaultLink
from helixbench.solver import Infeasible, Plan, SolveConfig, problems_of, solve_placement
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange
from tests.solver.brute_force import best_flow
from tests.solver.clusters import WORKLOAD, demo_cluster, model, table_node


@pytest.fixture
def unlike() -> ClusterProfile:
    nodes = (
        table_node("a", [100.0, 60.0, 40.0]),
        table_node("b", [90.0, 50.0]),
        table_node("c", [70.0, 30.0, 20.0]),
        table_node("d", [50.0]),
    )
    return ClusterProfile(model=model(5), nodes=nodes, default_link=DefaultLink(55e3))


@pytest.mark.parametrize("partial", [True, False])
def test_it_finds_the_optimum_of_a_small_cluster_with_links_that_bind(unlike: ClusterProfile, partial: bool) -> None:
    plan = solve_placement(
        SolveConfig(
            cluster=unlike, workload=WORKLOAD, objective="max-flow", method="published", partial=partial, concurrency=4
        )
    )
    assert isinstance(plan, Plan)
    assert not list(problems_of(unlike, plan))
    best = best_flow(Capacities(unlike, WORKLOAD, partial=partial))
    assert plan.predicted.max_flow_tokens_per_s == pytest.approx(best)
    assert plan.predicted.gap <= 1e-6
    assert plan.solver.status == "optimal"


def test_it_keeps_pins(unlike: ClusterProfile) -> None:
    pins = {"a": LayerRange(2, 4)}
    plan = solve_placement(
        SolveConfig(
            cluster=unlike, workload=WORKLOAD, objective="max-flow", method="published", pins=pins, concurrency=4
        )
    )
    assert isinstance(plan, Plan)
    assert plan.placement.get("a", pins["a"]) == pins["a"]


def test_measured_nodes_leave_the_bound_to_their_work() -> None:
    profile = demo_cluster()
    plan, best = (
        solve_placement(
            SolveConfig(
                cluster=profile, workload=WORKLOAD, objective="max-flow", method=method, time_limit_s=1, concurrency=8
            )
        )
        for method in ("published", "auto")
    )
    assert isinstance(plan, Plan)
    assert isinstance(best, Plan)
    assert plan.predicted.upper_bound_tokens_per_s >= best.predicted.max_flow_tokens_per_s * (1 - 1e-9)


def test_what_it_cannot_find_in_time_is_said_not_called_infeasible() -> None:
    nodes = tuple(table_node(f"n{i}", [float(1000 // k + i) for k in range(1, 9)]) for i in range(40))
    profile = ClusterProfile(model=model(80), nodes=nodes, default_link=DefaultLink(1e9))
    answer = solve_placement(
        SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow", method="published", time_limit_s=0.2)
    )
    assert isinstance(answer, Infeasible)
    assert "none is proven not to exist" in answer.reason
