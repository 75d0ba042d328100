"""Plans of tiny clusters are optimal: as good as brute force, and under their own bound."""

from __future__ import annotations

import pytest

from helixbench.solver import Infeasible, SolveConfig, problems_of, solve_placement
from helixbench.solver.problem.capacity import Capacities
from tests.solver.brute_force import best_flow
from tests.solver.clusters import WORKLOAD, in_regions, random_cluster, without_labels


def check_against_brute_force(seed: int) -> None:
    """One random cluster: the plan equals brute force, and its bound is not below.

    One of three is in several regions, every second of these without labels.
    """
    profile = random_cluster(seed)
    if seed % 3 == 1:
        profile = in_regions(profile, seed)
        profile = without_labels(profile, seed) if seed % 2 else profile
    partial, concurrency = seed % 2 == 0, 4 if seed % 3 == 0 else None
    best = best_flow(Capacities(profile, WORKLOAD, concurrency=concurrency, partial=partial))
    answer = solve_placement(
        SolveConfig(cluster=profile, workload=WORKLOAD, concurrency=concurrency, objective="max-flow", partial=partial)
    )
    if isinstance(answer, Infeasible):
        assert best == 0, answer.reason
        return
    assert not list(problems_of(profile, answer))
    assert answer.predicted.max_flow_tokens_per_s == pytest.approx(best, rel=1e-6)
    assert answer.predicted.upper_bound_tokens_per_s >= best * (1 - 1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_small_clusters_are_solved_as_brute_force_solves_them(seed: int) -> None:
    check_against_brute_force(seed)
