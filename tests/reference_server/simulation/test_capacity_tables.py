"""Nodes of which only a capacity table is known: the linear model keeps what the table says."""

from __future__ import annotations

import pytest

from helixbench.profiler.cost.model import BatchShape
from helixbench.reference_server.simulation import SimulationConfig, simulate
from helixbench.solver import Plan, SolveConfig, solve_placement
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.problem.tables import TABLE_NOTE
from helixbench.solver.problem.workload import fixed_workload
from helixbench.solver.questions.generate import make_cluster
from tests.reference_server.simulation.cases import OFFLINE

WORKLOAD = fixed_workload(prompt_tokens=763, output_tokens=232)


@pytest.fixture(scope="module")
def capacities() -> Capacities:
    return Capacities(make_cluster(num_nodes=12, num_types=4, num_regions=1, seed=3), WORKLOAD)


def test_a_full_iteration_carries_what_the_table_says_and_none_carries_more(capacities: Capacities) -> None:
    for node in capacities.profile.nodes:
        for layers in range(1, node.max_layers + 1):
            held = LayerRange(0, layers)
            cost, most = capacities.stage_cost(node.name, held), capacities.max_batch_tokens(node.name, held)
            rates = [
                tokens / cost.time_s(num_layers=n, batch=BatchShape(decode_tokens=tokens), first=True, last=False)
                for tokens in (1, most / 2, most)
                for n in (1, layers)  # a table holds for every entry
            ]
            assert max(rates) == pytest.approx(capacities.tokens_per_s(node.name, held), rel=1e-9)


def test_a_simulated_run_stays_below_the_bound_and_says_what_it_assumed() -> None:
    profile = make_cluster(num_nodes=10, num_types=2, num_regions=1, seed=1)
    plan = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, method="petals"))
    assert isinstance(plan, Plan)
    config = SimulationConfig(workload=WORKLOAD, arrivals=OFFLINE, duration_s=200.0, warmup_s=300.0)
    result = simulate(plan, profile, config)
    assert result.run.total_tokens_per_s <= plan.predicted.max_flow_tokens_per_s * 1.02
    assert TABLE_NOTE in result.remarks
    assert TABLE_NOTE in result.run.testbed
