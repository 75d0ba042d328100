"""Flows taken apart into pipelines."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver import Infeasible, Plan, SolveConfig, pipelines, solve_placement
from tests.solver.clusters import WORKLOAD, random_cluster


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    clusters = [random_cluster(seed, max_nodes=3, max_layers=4) for seed in range(500, 515)]
    found = [
        solve_placement(SolveConfig(cluster=cluster, workload=WORKLOAD, objective="max-flow")) for cluster in clusters
    ]
    return [plan for plan in found if not isinstance(plan, Infeasible)]


def test_pipelines_cover_the_model_and_carry_the_flow(plans: list[Plan]) -> None:
    for plan in plans:
        found = pipelines(plan)
        assert sum(share for _, share in found) == pytest.approx(plan.predicted.max_flow_tokens_per_s, rel=1e-4)
        for pipeline, share in found:
            assert share > 0
            assert pipeline[0].start == 0
            assert pipeline[-1].end == plan.num_layers
            for before, hop in itertools.pairwise(pipeline):
                held = plan.placement[hop.node]
                assert held.start <= hop.start == before.end < hop.end == held.end


def test_pipelines_use_each_link_as_much_as_the_flow_does(plans: list[Plan]) -> None:
    for plan in plans:
        used: defaultdict[tuple[str, str], float] = defaultdict(float)
        for pipeline, share in pipelines(plan):
            names = [COORDINATOR, *(hop.node for hop in pipeline), COORDINATOR]
            for link in itertools.pairwise(names):
                used[link] += share
        for flow in plan.flows:
            assert used[flow.src, flow.dst] == pytest.approx(
                flow.flow_tokens_per_s, abs=1e-4 * plan.predicted.max_flow_tokens_per_s
            )


def test_the_same_plan_gives_the_same_pipelines() -> None:
    cluster = random_cluster(7)
    first = solve_placement(SolveConfig(cluster=cluster, workload=WORKLOAD, objective="max-flow"))
    second = solve_placement(SolveConfig(cluster=cluster, workload=WORKLOAD, objective="max-flow"))
    assert isinstance(first, Plan)
    assert isinstance(second, Plan)
    assert first.placement == second.placement
    assert pipelines(first) == pipelines(second)
