"""How long a closed loop is simulated."""

from __future__ import annotations

from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.simulation.closed_loop import simulate_closed_loop
from tests.reference_server.simulation.cases import MIXED, four_nodes


def test_it_goes_on_until_two_windows_agree_or_the_work_is_used_up() -> None:
    profile, plan = four_nodes()
    capacities = Capacities(profile, MIXED)
    settled = simulate_closed_loop(capacities, plan.placement, plan.flows, 40, max_windows=20)
    assert settled is not None
    assert settled.is_settled
    assert settled.rounds >= 8
    cut = simulate_closed_loop(capacities, plan.placement, plan.flows, 40, max_windows=20, max_work=settled.work // 3)
    assert cut is not None
    assert not cut.is_settled
    assert simulate_closed_loop(capacities, plan.placement, plan.flows, 40, max_work=100) is None
