"""The checker finds what is wrong with a plan, from the profile alone."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from helixbench.profiler.cluster import ClusterProfile, DefaultLink
from helixbench.solver import Infeasible, Plan, PlanError, SolveConfig, problems_of, require_sound, solve_placement
from helixbench.solver.problem.plan import LayerRange
from tests.solver.clusters import WORKLOAD, model, table_node

replace = msgspec.structs.replace


@pytest.fixture
def profile() -> ClusterProfile:
    return ClusterProfile(
        model=model(4),
        nodes=(table_node("a", [100.0, 60.0]), table_node("b", [80.0, 50.0]), table_node("c", [90.0, 40.0])),
        default_link=DefaultLink(1e6),
    )


@pytest.fixture
def plan(profile: ClusterProfile) -> Plan:
    answer = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow"))
    assert not isinstance(answer, Infeasible)
    return answer


def _first_flow(plan: Plan, factor: float) -> Plan:
    first, *rest = plan.flows
    return replace(plan, flows=(replace(first, flow_tokens_per_s=first.flow_tokens_per_s * factor), *rest))


def _node_capacity(plan: Plan) -> Plan:
    name = next(iter(plan.nodes))
    return replace(plan, nodes={**plan.nodes, name: replace(plan.nodes[name], capacity_tokens_per_s=1e6)})


DAMAGES: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "flow not conserved": (lambda p: _first_flow(p, 0.5), "leave it"),
    "claims too much": (
        lambda p: replace(p, predicted=replace(p.predicted, max_flow_tokens_per_s=1e3)),
        "predicted.max_flow_tokens_per_s",
    ),
    "bound below the plan": (
        lambda p: replace(p, predicted=replace(p.predicted, upper_bound_tokens_per_s=1.0)),
        "upper_bound_tokens_per_s: 1 is below",
    ),
    "wrong gap": (lambda p: replace(p, predicted=replace(p.predicted, gap=0.5)), "predicted.gap"),
    "wrong capacity": (_node_capacity, "capacity_tokens_per_s"),
    "twice the flow": (
        lambda p: replace(p, flows=tuple(replace(f, flow_tokens_per_s=2 * f.flow_tokens_per_s) for f in p.flows)),
        "times what it can do",
    ),
    "too many layers": (
        lambda p: replace(p, placement={name: LayerRange(0, 4) for name in p.placement}),
        "does not fit",
    ),
}


def test_checker_passes_a_sound_plan(profile: ClusterProfile, plan: Plan) -> None:
    require_sound(profile, plan)


@pytest.mark.parametrize("damage", DAMAGES)
def test_checker_names_what_is_wrong(profile: ClusterProfile, plan: Plan, damage: str) -> None:
    break_it, said = DAMAGES[damage]
    try:
        broken = break_it(plan)
    except ValueError:
        pytest.fail("the damage must be one that the record itself accepts")
    assert any(said in problem for problem in problems_of(profile, broken))
    with pytest.raises(PlanError):
        require_sound(profile, broken)


def test_checker_refuses_a_plan_for_other_nodes(profile: ClusterProfile, plan: Plan) -> None:
    other = replace(profile, nodes=(table_node("x", [1.0, 1.0, 1.0, 1.0]),))
    assert any("no node of the cluster" in problem for problem in problems_of(other, plan))


def test_checker_sees_a_link_that_got_slower(profile: ClusterProfile, plan: Plan) -> None:
    slower = replace(profile, default_link=DefaultLink(1e3))
    assert any("but the link carries" in problem for problem in problems_of(slower, plan))
