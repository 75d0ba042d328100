"""How long a closed loop is simulated, and what it counts."""

from __future__ import annotations

import pytest

from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.simulation.closed_loop import simulate_closed_loop
from tests.reference_server.simulation.cases import MIXED, WORKLOAD, cluster, four_nodes, plan_of


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


def test_clients_that_wait_for_room_wait_as_littles_law_says_and_shares_are_those_of_the_room() -> None:
    """Two equal pipelines with flows of 3 to 1 and room for as many requests each: full caches even them out."""
    profile = cluster({"a": 1.0, "b": 1.0}, memory_bytes=1.0e7)
    plan = plan_of(profile, {"a": (0, 8), "b": (0, 8)}, [(["a"], 3.0), (["b"], 1.0)])
    found = simulate_closed_loop(Capacities(profile, WORKLOAD), plan.placement, plan.flows, 64, max_windows=20)
    assert found is not None
    expected = found.expected
    assert expected.in_flight is not None
    assert expected.in_flight < 60  # so that some wait
    assert expected.node_share == {"a": pytest.approx(0.5, abs=0.05), "b": pytest.approx(0.5, abs=0.05)}
    assert expected.link_share["coordinator"] == pytest.approx(expected.node_share)
    assert expected.link_share["a"]["coordinator"] == pytest.approx(expected.node_share["a"])
    # 64 clients = requests/s * time that each takes
    ((_, output_tokens),) = WORKLOAD.lengths
    assert expected.ttft_s is not None
    assert expected.tpot_s is not None
    request_s = expected.ttft_s + (output_tokens - 1) * expected.tpot_s
    assert expected.output_tokens_per_s / output_tokens * request_s == pytest.approx(64, rel=0.03)
    assert expected.ttft is not None
    assert expected.ttft.p50_s <= expected.ttft.p90_s <= expected.ttft.p99_s
