"""The bound of what is expected: never below any placement's, analytically or simulated."""

from __future__ import annotations

import itertools
import random

import pytest

from helixbench.profiler.cluster import ClusterProfile, DefaultLink
from helixbench.solver import Infeasible, Plan
from helixbench.solver.bounds.latency import bound_of_expected, least_nodes, least_round_s, most_in_flight
from helixbench.solver.expected.analytic import kv_requests, predict_analytically
from helixbench.solver.expected.simulated import expected_of
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.flow.pipelines import pipelines_of
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.problem.workload import fixed_workload
from helixbench.solver.questions.answer import answer
from helixbench.solver.questions.config import SolveConfig
from tests.solver.clusters import WORKLOAD, cost_node, demo_cluster, model, random_cluster, table_node


def _placements(capacities: Capacities, rng: random.Random, count: int) -> list[dict[str, LayerRange]]:
    """Some placements that carry something, with ranges drawn at random."""
    layers = capacities.model.num_layers
    choices = {
        name: [
            held
            for start, end in itertools.combinations(range(layers + 1), 2)
            if capacities.can_hold(name, held := LayerRange(start, end))
        ]
        for name in capacities.nodes
    }
    drawn = []
    for _ in range(count):
        placement = {name: rng.choice(ranges) for name, ranges in choices.items() if ranges}
        covered = {layer for held in placement.values() for layer in range(held.start, held.end)}
        if len(covered) == layers:
            drawn.append(placement)
    return drawn


@pytest.mark.parametrize("seed", range(60))
def test_no_placement_is_expected_to_give_more(seed: int) -> None:
    rng = random.Random(seed)
    profile, concurrency = random_cluster(seed), rng.choice([None, 1, 3, 20])
    capacities = Capacities(profile, WORKLOAD, concurrency=concurrency, partial=rng.random() < 0.7)
    bound = bound_of_expected(capacities, float("inf"))
    for placement in _placements(capacities, rng, 40):
        flow = max_flow(capacities, placement, spread=True)
        if flow.tokens_per_s <= 0:
            continue
        held = flow.used(placement)
        means = predict_analytically(capacities, held, flow.links, concurrency)
        assert means.total_tokens_per_s <= bound.tokens_per_s * (1 + 1e-9)
        assert (means.tpot_s or 0) >= bound.least_tpot_s * (1 - 1e-9)
        assert kv_requests(capacities, held, pipelines_of(held, flow.links)) <= most_in_flight(capacities)


@pytest.mark.parametrize("concurrency", [1, 2, 16])
def test_simulated_requests_stay_within_the_bound(concurrency: int) -> None:
    capacities = Capacities(demo_cluster(), WORKLOAD, concurrency=concurrency)
    bound = bound_of_expected(capacities, float("inf"))
    for placement in ({"big": LayerRange(0, 16)}, {"big": LayerRange(0, 10), "mid": LayerRange(10, 16)}):
        flow = max_flow(capacities, placement, spread=True)
        expected = expected_of(capacities, placement, flow, concurrency)
        assert (expected.tpot_s or 0) >= bound.least_tpot_s
        assert expected.total_tokens_per_s <= bound.tokens_per_s


def test_least_round_of_one_node_is_its_iteration_with_one_token() -> None:
    node = cost_node("n", max_layers=8)
    profile = ClusterProfile(model=model(8), nodes=(node,), default_link=DefaultLink(1e9, 0.25))
    capacities = Capacities(profile, fixed_workload(prompt_tokens=1, output_tokens=9))
    assert node.cost is not None
    stage = node.cost.stage
    by_hand = stage.step_s + stage.step_item_s + stage.step_token_s
    by_hand += 8 * (stage.layer_s + stage.layer_decode_item_s + stage.layer_decode_context_s)
    assert least_round_s(capacities) == pytest.approx(0.5 + 2 * 2e-9 + by_hand, rel=1e-6)


def test_each_node_is_used_once() -> None:
    nodes = (cost_node("fast", speed=10.0, max_layers=4), *(cost_node(f"slow{i}", max_layers=4) for i in range(2)))
    both = ClusterProfile(model=model(8), nodes=nodes, default_link=DefaultLink(1e9))
    alone = ClusterProfile(model=model(8), nodes=nodes[1:], default_link=DefaultLink(1e9))
    twice = (cost_node("fast", speed=10.0, max_layers=4), cost_node("fast2", speed=10.0, max_layers=4))
    best = ClusterProfile(model=model(8), nodes=twice, default_link=DefaultLink(1e9))
    mixed, slow, fast = (least_round_s(Capacities(profile, WORKLOAD)) for profile in (both, alone, best))
    assert mixed == pytest.approx((slow + fast) / 2, rel=1e-6)


def test_a_latency_below_the_least_is_refused_with_proof() -> None:
    profile = demo_cluster()
    least = least_round_s(Capacities(profile, WORKLOAD))
    refused = answer(SolveConfig(cluster=profile, workload=WORKLOAD, max_tpot_s=least * 0.99, time_limit_s=1)).plan
    assert isinstance(refused, Infeasible)
    assert "no plan can keep" in refused.reason
    kept = answer(SolveConfig(cluster=profile, workload=WORKLOAD, max_tpot_s=least * 4, time_limit_s=2)).plan
    assert isinstance(kept, Plan)
    bound = kept.predicted.bound_of_expected
    assert bound is not None
    assert kept.predicted.expected[-1].total_tokens_per_s <= bound.tokens_per_s
    assert (kept.predicted.expected[-1].tpot_s or 0) >= bound.least_tpot_s


def test_fewest_nodes_come_with_the_least_that_there_can_be() -> None:
    nodes = tuple(table_node(name, [100.0, 60.0, 40.0]) for name in ("a", "b", "c", "d"))
    profile = ClusterProfile(model=model(6), nodes=nodes, default_link=DefaultLink(1e9))
    capacities = Capacities(profile, WORKLOAD)
    # Work of a node at F: max over k of k * min(T(k), F); two nodes of three layers carry 40, at 60 three are needed.
    assert [least_nodes(capacities, wanted) for wanted in (1.0, 40.0, 60.0, 100.0)] == [2, 2, 3, 5]
    plan = answer(SolveConfig(cluster=profile, workload=WORKLOAD, min_tokens_per_s=20.0, time_limit_s=2)).plan
    assert isinstance(plan, Plan)
    assert plan.predicted.least_nodes == len(plan.placement) == 2
    refused = answer(SolveConfig(cluster=profile, workload=WORKLOAD, min_tokens_per_s=100.0, time_limit_s=1)).plan
    assert isinstance(refused, Infeasible)
