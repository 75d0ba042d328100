"""The published clusters: known optima and the published results of the baselines."""

from __future__ import annotations

import msgspec
import pytest

from helixbench.profiler.cluster import ClusterProfile, Node
from helixbench.solver import Infeasible, Plan, SolveConfig, problems_of, solve_placement
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.placement.baselines import METHODS, swarm
from helixbench.solver.problem.capacity import Capacities
from tests.solver.clusters import WORKLOAD, cost_node, published, table_node


@pytest.fixture(scope="module")
def published24() -> ClusterProfile:
    return published("published24-llama70b")


@pytest.mark.parametrize("partial", [True, False])
def test_published24_is_solved_to_its_known_optimum(published24: ClusterProfile, partial: bool) -> None:
    plan = solve_placement(SolveConfig(cluster=published24, workload=WORKLOAD, objective="max-flow", partial=partial))
    assert isinstance(plan, Plan)
    assert not list(problems_of(published24, plan))
    assert plan.predicted.max_flow_tokens_per_s == pytest.approx(2045.6410473362616)
    assert plan.predicted.gap <= 1e-6
    assert plan.solver.status == "optimal"


@pytest.mark.parametrize(
    ("method", "partial", "tokens_per_s"),
    [
        ("petals", True, 952.11),
        ("petals", False, 531.70),
        ("swarm", True, 757.85),
        ("swarm", False, 757.85),
        ("homogeneous", True, 531.70),
        ("homogeneous", False, 531.70),
    ],
)
def test_baselines_match_their_published_max_flow(
    published24: ClusterProfile, method: str, partial: bool, tokens_per_s: float
) -> None:
    capacities = Capacities(published24, WORKLOAD, partial=partial)
    placement = METHODS[method](capacities)
    assert placement is not None
    assert max_flow(capacities, placement).tokens_per_s == pytest.approx(tokens_per_s, abs=0.01)


@pytest.mark.parametrize("useless", [table_node("z", []), cost_node("z", memory_bytes=1e6)])
def test_swarm_leaves_out_what_holds_no_layer(published24: ClusterProfile, useless: Node) -> None:
    more = msgspec.structs.replace(published24, nodes=(*published24.nodes, useless))
    assert swarm(Capacities(more, WORKLOAD)) == swarm(Capacities(published24, WORKLOAD)) is not None


def test_separate_finds_nothing_where_no_type_holds_the_model_alone(published24: ClusterProfile) -> None:
    answer = solve_placement(
        SolveConfig(cluster=published24, workload=WORKLOAD, objective="max-flow", method="separate")
    )
    assert isinstance(answer, Infeasible)
    assert "80 layers" in answer.reason


def test_three_regions_without_labels_are_planned_to_their_best_known_flow() -> None:
    profile = published("published24-three-regions-llama70b")
    assert not any(node.region for node in profile.nodes)
    plan = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow", time_limit_s=5))
    assert isinstance(plan, Plan)
    assert not list(problems_of(profile, plan))
    assert plan.predicted.max_flow_tokens_per_s >= 1754.38
    assert {node.region for node in plan.nodes.values()} == {"group-1", "group-2", "group-3"}


def test_published8_is_solved_to_its_optimum() -> None:
    """Single layers prove it: what two nodes hold together needs more of them than one node that holds ten layers."""
    profile = published("published8-l4-llama30b")
    plan = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow", time_limit_s=10))
    assert isinstance(plan, Plan)
    assert not list(problems_of(profile, plan))
    assert plan.predicted.max_flow_tokens_per_s >= 252.649
    assert plan.predicted.gap <= 1e-6
    assert plan.solver.status == "optimal"
