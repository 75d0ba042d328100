from __future__ import annotations

import pytest

from helixbench.profiler.cluster import COORDINATOR, ClusterProfile, DefaultLink
from helixbench.solver import fixed_workload
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Hop, LayerRange
from helixbench.solver.scheduling.reflow import Observed, is_worth_changing, reflow
from tests.solver.clusters import model, table_node

PLACEMENT = {"a": LayerRange(0, 2), "b": LayerRange(0, 2), "c": LayerRange(2, 4), "d": LayerRange(2, 4)}


def capacities(**tokens_per_s: float) -> Capacities:
    rates = {"a": 100.0, "b": 100.0, "c": 100.0, "d": 100.0} | tokens_per_s
    nodes = [table_node(name, [2 * rate, rate]) for name, rate in rates.items()]
    profile = ClusterProfile(model=model(4), nodes=tuple(nodes), default_link=DefaultLink(1e9))
    return Capacities(profile, fixed_workload(prompt_tokens=8, output_tokens=8))


def through(weights: dict[tuple[Hop, ...], float], node: str) -> float:
    return sum(share for hops, share in weights.items() if any(hop.node == node for hop in hops))


def test_with_nothing_observed_it_is_the_planned_flow() -> None:
    known = capacities(a=60.0)
    weights = reflow(known, PLACEMENT, Observed())

    assert weights.tokens_per_s == pytest.approx(max_flow(known, PLACEMENT).tokens_per_s)
    assert through(weights.shares(), "a") == pytest.approx(60 / 160)


def test_a_slow_node_gets_less() -> None:
    weights = reflow(capacities(), PLACEMENT, Observed(ratios={"a": 2.0}))

    assert weights.tokens_per_s == pytest.approx(150.0)
    assert through(weights.shares(), "a") == pytest.approx(50 / 150)


def test_an_unusable_node_gets_nothing() -> None:
    weights = reflow(capacities(), PLACEMENT, Observed(unusable={"d"}))

    assert weights.tokens_per_s == pytest.approx(100.0)
    assert through(weights.shares(), "d") == 0


def test_a_link_that_is_down_is_passed_over() -> None:
    weights = reflow(capacities(), PLACEMENT, Observed(links_down={("a", "c"), ("a", "d")}))

    assert weights.tokens_per_s == pytest.approx(100.0)
    assert through(weights.shares(), "a") == 0


def test_a_slow_link_carries_its_observed_share() -> None:
    known = capacities()
    link = (COORDINATOR, "a")
    full = known.links.bandwidth(*link)
    assert full is not None
    share = 20.0 * known.profile.bytes_per_token(*link) / full
    weights = reflow(known, PLACEMENT, Observed(link_shares={link: share}))

    assert weights.tokens_per_s == pytest.approx(120.0)
    assert through(weights.shares(), "a") == pytest.approx(20 / 120)


def test_where_a_layer_is_held_by_nobody_nothing_flows() -> None:
    weights = reflow(capacities(), PLACEMENT, Observed(unusable={"c", "d"}))

    assert (weights.tokens_per_s, weights.pipelines, weights.shares()) == (0.0, (), {})


def test_small_changes_are_not_worth_it() -> None:
    one, two = (Hop("a", 0, 4),), (Hop("b", 0, 4),)
    assert not is_worth_changing({one: 0.5, two: 0.5}, {one: 0.54, two: 0.46})
    assert is_worth_changing({one: 0.5, two: 0.5}, {one: 0.56, two: 0.44})
    assert is_worth_changing({one: 1.0}, {})
