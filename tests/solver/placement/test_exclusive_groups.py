"""Of the nodes of an exclusive group a plan uses one at most, and the best plan is found that does."""

from __future__ import annotations

import random

import msgspec
import pytest

from helixbench.profiler.cluster import ClusterProfile, DefaultLink
from helixbench.solver import Infeasible, Plan, SolveConfig, problems_of, solve_placement
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Placement
from tests.solver.brute_force import best_flow
from tests.solver.clusters import WORKLOAD, cost_node, model, random_cluster, table_node


def grouped(profile: ClusterProfile, seed: int) -> ClusterProfile:
    """Some of the nodes in one or two groups, drawn at random."""
    rng = random.Random(seed)
    nodes = tuple(
        msgspec.structs.replace(node, exclusive_group=rng.choice(("", "here", "here", "there")))
        for node in profile.nodes
    )
    return msgspec.structs.replace(profile, nodes=nodes)


def used_groups(profile: ClusterProfile, placement: Placement) -> list[str]:
    return [node.exclusive_group for node in profile.nodes if node.name in placement and node.exclusive_group]


def check_exclusive_groups_against_brute_force(seed: int) -> None:
    """One random cluster whose nodes are in groups: the plan equals brute force, and its bound is not below."""
    profile = grouped(random_cluster(seed), seed)
    partial = seed % 2 == 0
    best = best_flow(Capacities(profile, WORKLOAD, partial=partial))
    answer = solve_placement(
        SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow", partial=partial, time_limit_s=30)
    )
    if isinstance(answer, Infeasible):
        assert best == 0, answer.reason
        return
    assert not list(problems_of(profile, answer))
    used = used_groups(profile, answer.placement)
    assert len(used) == len(set(used))
    assert answer.predicted.max_flow_tokens_per_s == pytest.approx(best, rel=1e-6)
    assert answer.predicted.upper_bound_tokens_per_s >= best * (1 - 1e-6)


@pytest.mark.parametrize("seed", range(30))
def test_plans_with_exclusive_groups_are_those_of_brute_force(seed: int) -> None:
    check_exclusive_groups_against_brute_force(seed)


def machine(*, groups: tuple[str, str]) -> ClusterProfile:
    """Two halves of a machine, and the pair of them as one node in either group."""
    nodes = (
        cost_node("one", max_layers=8, exclusive_group=groups[0]),
        cost_node("pair", speed=1.8, max_layers=8, exclusive_group=groups[1]),
        cost_node("other", max_layers=8),
    )
    return ClusterProfile(model=model(16), nodes=nodes, default_link=DefaultLink(1e8, 1e-4))


@pytest.mark.parametrize("method", ["auto", "petals", "swarm"])
@pytest.mark.parametrize("objective", ["throughput", "max-flow"])
def test_every_method_uses_one_node_of_a_group(method: str, objective: str) -> None:
    profile = machine(groups=("machine", "machine"))
    plan = solve_placement(
        SolveConfig(
            cluster=profile,
            workload=WORKLOAD,
            concurrency=8,
            method=method,
            objective=objective,  # type: ignore[arg-type]
            time_limit_s=2,
        )
    )
    assert isinstance(plan, Plan)
    assert set(plan.placement) == {"pair", "other"}


def test_the_checker_refuses_two_nodes_of_a_group() -> None:
    free = machine(groups=("", ""))
    plan = solve_placement(SolveConfig(cluster=free, workload=WORKLOAD, objective="max-flow", time_limit_s=2))
    assert isinstance(plan, Plan)
    assert {"one", "pair"} <= set(plan.placement)
    found = list(problems_of(machine(groups=("machine", "machine")), plan))
    assert any("exclusive group machine" in problem for problem in found)


def test_alike_nodes_of_two_groups_may_both_be_used() -> None:
    nodes = tuple(
        table_node(f"{group}-{form}", [90.0, 50.0], exclusive_group=group) for group in ("a", "b") for form in "12"
    )
    profile = ClusterProfile(model=model(4), nodes=nodes, default_link=DefaultLink(1e9))
    plan = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow", time_limit_s=2))
    assert isinstance(plan, Plan)
    assert plan.predicted.max_flow_tokens_per_s == pytest.approx(50.0)
    assert sorted(used_groups(profile, plan.placement)) == ["a", "b"]
