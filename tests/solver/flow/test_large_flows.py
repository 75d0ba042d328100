"""What is done otherwise for large clusters: flows by the interior point method, and time kept to write up the plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from helixbench.solver.flow import max_flow as flow
from helixbench.solver.flow.max_flow import largest_flow
from helixbench.solver.placement import incumbent, milp
from helixbench.solver.placement.baselines import petals
from helixbench.solver.placement.incumbent import WRITE_UP, Search
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.problem.question import Question
from helixbench.solver.questions.generate import make_cluster
from tests.solver.clusters import WORKLOAD, random_cluster


def check_flow(capacities: Capacities, placement: dict[str, LayerRange], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same flow by both methods, spread too, with a min cut that proves it."""
    by_simplex = flow.max_flow(capacities, placement, partial=True)
    monkeypatch.setattr(flow, "MANY_ARCS", 0)
    for spread in (False, True):
        found = flow.max_flow(capacities, placement, partial=True, spread=spread)
        assert found.tokens_per_s == pytest.approx(by_simplex.tokens_per_s, rel=1e-9)
        assert sum(share.tokens_per_s for share in found.cut) == pytest.approx(found.tokens_per_s, rel=1e-6)
    monkeypatch.undo()


def test_a_flow_by_the_interior_point_method_is_the_same_and_has_its_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = make_cluster(num_nodes=60, num_types=5, num_regions=4, seed=2)
    capacities = Capacities(cluster, WORKLOAD)
    placement = petals(capacities)
    assert placement is not None
    check_flow(capacities, placement, monkeypatch)


@pytest.mark.parametrize("seed", [seed for seed in range(20) if seed not in (5, 9)])  # they have no placement
def test_so_it_is_on_small_clusters_with_links_and_cards_that_bind(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    capacities = Capacities(random_cluster(seed), WORKLOAD)
    placement = petals(capacities)
    assert placement is not None
    check_flow(capacities, placement, monkeypatch)


def test_the_search_ends_early_enough_to_write_up_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def slowly(*arguments: Any, **options: Any) -> flow.Flow:
        nonlocal now_s
        now_s += 4.0
        return largest_flow(*arguments, **options)

    clock = SimpleNamespace(perf_counter=lambda: now_s, process_time=lambda: now_s)
    monkeypatch.setattr(incumbent, "time", clock)
    monkeypatch.setattr(incumbent, "largest_flow", slowly)
    capacities = Capacities(make_cluster(num_nodes=10, num_types=3, num_regions=1, seed=0), WORKLOAD)
    search = Search(Question(capacities, "max-flow", True), milp.Limits(time_s=100.0), lambda _: None, started=0.0)
    assert search.left() == 100.0
    assert search.offer(petals(capacities), "petals placement")
    assert search.left() == 100.0 - 4.0 - WRITE_UP * 4.0
