"""Solvers by PuLP's names: CBC finds and proves what HiGHS does; one that is not there is one sentence."""

from __future__ import annotations

import sys

import pytest

from helixbench.errors import InputError
from helixbench.solver import Plan, SolveConfig, problems_of, solve_placement
from helixbench.solver.flow.highs import load_highspy
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.flow.pulp_solvers import HIGHS, find_solver
from helixbench.solver.placement import milp
from helixbench.solver.problem.capacity import Capacities
from tests.solver.brute_force import best_flow
from tests.solver.clusters import WORKLOAD, published, random_cluster

CBC = "PULP_CBC_CMD"


@pytest.mark.parametrize("solver", [HIGHS, CBC])
@pytest.mark.parametrize(
    ("name", "clip", "best"),
    [("published24-llama70b", 2045.642, 2045.641), ("published8-l4-llama30b", 252.6499, 252.6498)],
)
def test_published_clusters_are_solved_to_their_known_optima(solver: str, name: str, clip: float, best: float) -> None:
    capacities = Capacities(published(name), WORKLOAD)
    model = milp.pooled_model(capacities, list(capacities.nodes), clip=clip)
    outcome = milp.solve(model, milp.Limits(time_s=120.0, solver=solver))
    assert outcome.end is milp.End.OPTIMAL
    assert outcome.value == pytest.approx(best, abs=0.01)
    assert outcome.bound == pytest.approx(best, abs=0.01)
    assert outcome.placement is not None
    assert max_flow(capacities, outcome.placement).tokens_per_s == pytest.approx(best, abs=0.01)


@pytest.mark.parametrize("seed", range(8))
def test_cbc_plans_small_clusters_as_well_as_brute_force(seed: int) -> None:
    profile = random_cluster(seed)
    capacities = Capacities(profile, WORKLOAD)
    best = best_flow(capacities)
    model = milp.linked_model(capacities, list(capacities.nodes), clip=max(1.0, 1.5 * best))
    outcome = milp.solve(model, milp.Limits(time_s=30.0, solver=CBC))
    if best <= 0:
        assert outcome.value == pytest.approx(0.0, abs=1e-6)
        return
    assert outcome.placement is not None
    assert max_flow(capacities, outcome.placement).tokens_per_s == pytest.approx(best, rel=1e-4)
    assert outcome.bound >= best * (1 - 1e-4)


def test_a_run_that_was_stopped_has_a_bound_that_holds() -> None:
    """PuLP calls such a run "Optimal"; what it has proven is in the solver's own words."""
    capacities = Capacities(published("published24-llama70b"), WORKLOAD)
    model = milp.pooled_model(capacities, list(capacities.nodes), clip=9000.0)
    outcome = milp.solve(model, milp.Limits(time_s=1.0, solver=CBC))
    assert outcome.bound >= 2045.64
    assert outcome.end is milp.End.OPTIMAL or outcome.bound > outcome.value


def test_a_plan_names_the_solver() -> None:
    profile = published("published24-llama70b")
    plan = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow", solver="cbc"))
    assert isinstance(plan, Plan)
    assert not list(problems_of(profile, plan))
    assert plan.predicted.max_flow_tokens_per_s == pytest.approx(2045.641, abs=0.01)
    assert CBC in plan.solver.backend


@pytest.mark.parametrize(("name", "says"), [("nope", "PuLP knows no such solver"), ("MOSEK", "not installed")])
def test_a_solver_that_is_not_there_is_one_sentence(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as raised:
        find_solver(name)
    assert "\n" not in str(raised.value)


def test_highs_that_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    load_highspy.cache_clear()
    monkeypatch.setitem(sys.modules, "highspy", None)
    config = SolveConfig(cluster=random_cluster(1), workload=WORKLOAD, method="petals")
    with pytest.raises(InputError, match="pip install highspy"):
        solve_placement(config)
