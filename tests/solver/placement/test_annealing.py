"""The fast max-flow, and annealing by it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from helixbench.profiler.cluster import ClusterProfile
from helixbench.solver import Plan, SolveConfig, problems_of, solve_placement
from helixbench.solver.bounds.configurations import Configurations
from helixbench.solver.bounds.work import work_bound
from helixbench.solver.flow.fast_flow import FastFlow
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.placement.annealing import annealed
from helixbench.solver.placement.baselines import METHODS
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.questions.generate import make_cluster
from tests.solver.clusters import WORKLOAD


def cluster(nodes: int, types: int, regions: int, seed: int) -> ClusterProfile:
    return make_cluster(num_nodes=nodes, num_types=types, num_regions=regions, seed=seed)


def bound_of(capacities: Capacities) -> float:
    high = work_bound(capacities)
    return Configurations(capacities).bound(low=0.0, high=high)


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_the_fast_flow_is_the_exact_one_where_cards_do_not_bind(seed: int, partial: bool) -> None:
    capacities = Capacities(cluster(14, 4, 1 + seed % 3, seed), WORKLOAD, partial=partial)
    fast = FastFlow(capacities)
    for rule in METHODS.values():
        placement = rule(capacities)
        if placement is None:
            continue
        held = [placement.get(name) for name in capacities.nodes]
        flow = fast.tokens_per_s(
            np.array([h.start if h else 0 for h in held]),
            np.array([h.end if h else 0 for h in held]),
            np.array(
                [capacities.tokens_per_s(n, h) if h else 0.0 for n, h in zip(capacities.nodes, held, strict=True)]
            ),
        )
        assert flow == pytest.approx(max_flow(capacities, placement).tokens_per_s, abs=0.1)


@pytest.mark.parametrize("partial", [True, False])
def test_annealing_only_gets_better_and_says_what_it_carries(partial: bool) -> None:
    capacities = Capacities(cluster(8, 2, 2, 5), WORKLOAD, partial=partial)
    start = METHODS["homogeneous"](capacities)
    assert start is not None
    asked = itertools.count()
    carried = first = max_flow(capacities, start).tokens_per_s
    for placement in annealed(
        capacities,
        start,
        bound=bound_of(capacities),
        coolings=1,
        may_go_on=lambda: next(asked) < 1500,
        seed=0,
    ):
        flow = max_flow(capacities, placement).tokens_per_s
        assert flow > carried
        carried = flow
    assert carried > 1.05 * first


def test_the_same_seed_gives_the_same_plan() -> None:
    profile = cluster(10, 3, 1, 0)

    def solved() -> Plan:
        plan = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow", time_limit_s=600))
        assert isinstance(plan, Plan)
        assert not list(problems_of(profile, plan))
        return plan

    one, other = solved(), solved()
    assert one.placement == other.placement
    assert one.predicted.upper_bound_tokens_per_s == other.predicted.upper_bound_tokens_per_s


def test_annealing_with_the_same_seed_takes_the_same_way() -> None:
    capacities = Capacities(cluster(8, 2, 2, 5), WORKLOAD)
    start = METHODS["homogeneous"](capacities)
    assert start is not None

    def way(seed: int) -> list[dict[str, LayerRange]]:
        asked = itertools.count()
        return list(
            annealed(
                capacities,
                start,
                bound=1e4,
                coolings=1,
                may_go_on=lambda: next(asked) < 500,
                seed=seed,
            )
        )

    assert way(1) == way(1)
    assert way(1) != way(2)
