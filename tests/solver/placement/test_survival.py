"""Plans that go on after the loss of any one node: optimal on tiny clusters, checked, and with their price."""

from __future__ import annotations

import msgspec
import pytest

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile, DefaultLink, Link
from helixbench.solver import Infeasible, Plan, SolveConfig, answer, problems_of
from helixbench.solver.flow.survival import survives
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.questions.generate import make_cluster
from tests.solver.brute_force import best_flow, largest_flow
from tests.solver.clusters import WORKLOAD, cost_node, model, random_cluster, table_node, without_labels

replace = msgspec.structs.replace


def check_survival_against_brute_force(seed: int) -> bool:
    """One random cluster: flow, price and what is left after each loss equal brute force; whether there is a plan."""
    profile = random_cluster(seed, max_layers=4)
    partial, concurrency = seed % 2 == 0, 4 if seed % 3 == 0 else None
    free = best_flow(Capacities(profile, WORKLOAD, concurrency=concurrency, partial=partial))
    best = best_flow(Capacities(profile, WORKLOAD, concurrency=concurrency, partial=partial, survive=1))
    config = SolveConfig(
        cluster=profile, workload=WORKLOAD, concurrency=concurrency, objective="max-flow", partial=partial, survive=1
    )
    found = answer(config).plan
    if isinstance(found, Infeasible):
        assert best == 0, found.reason
        return False
    assert not list(problems_of(profile, found))
    assert found.predicted.max_flow_tokens_per_s == pytest.approx(best, rel=1e-6)
    assert found.predicted.upper_bound_tokens_per_s >= best * (1 - 1e-6)
    survival = found.predicted.survival
    assert survival is not None
    assert survival.price_tokens_per_s == pytest.approx(free - best, rel=1e-5, abs=1e-5 * free)
    assert survival.least_price_tokens_per_s is not None
    assert survival.least_price_tokens_per_s <= free - best + 1e-5 * free
    for lost, after in survival.after_loss.items():
        left = {name: held for name, held in found.placement.items() if name != lost}
        assert after.max_flow_tokens_per_s == pytest.approx(largest_flow(config.capacities(), left), rel=1e-6)
    return True


def test_small_clusters_survive_as_well_as_brute_force() -> None:
    solved = sum(check_survival_against_brute_force(seed) for seed in range(20))
    assert solved >= 6


def two_and_a_half() -> ClusterProfile:
    nodes = (table_node("a", [100.0, 60.0]), table_node("b", [100.0, 60.0]), table_node("c", [100.0]))
    return ClusterProfile(model=model(2), nodes=nodes, default_link=DefaultLink(1e9))


def test_the_price_is_what_cover_costs() -> None:
    found = answer(SolveConfig(cluster=two_and_a_half(), workload=WORKLOAD, objective="max-flow", survive=1)).plan
    assert isinstance(found, Plan)
    held = {name: range_.num_layers for name, range_ in found.placement.items()}
    assert sum(held.values()) >= 4
    survival = found.predicted.survival
    assert survival is not None
    assert set(survival.after_loss) == set(found.placement)
    assert all(after.expected_tokens_per_s > 0 for after in survival.after_loss.values())


def test_layers_that_are_held_twice_do_not_survive_without_the_links_between() -> None:
    nodes = tuple(table_node(name, [100.0]) for name in ("a1", "a2", "b1", "b2"))
    profile = ClusterProfile(model=model(2), nodes=nodes, default_link=DefaultLink(1e9))
    placement = {"a1": LayerRange(0, 1), "a2": LayerRange(0, 1), "b1": LayerRange(1, 2), "b2": LayerRange(1, 2)}
    assert survives(Capacities(profile, WORKLOAD), placement)
    ends = [("coordinator", "a1"), ("coordinator", "a2"), ("b1", "coordinator"), ("b2", "coordinator")]
    links = tuple(Link(src=a, dst=b, bandwidth_bytes_per_s=1e9) for a, b in [*ends, ("a1", "b1"), ("a2", "b1")])
    assert not survives(Capacities(replace(profile, links=links, default_link=None), WORKLOAD), placement)


def test_a_node_that_carries_nothing_until_another_is_lost_stays_in_the_plan() -> None:
    """The coordinator's NIC is full with ``fast`` alone; ``spare`` is what is left without it."""
    nodes = (cost_node("fast", speed=4.0), cost_node("spare", speed=0.1))
    profile = ClusterProfile(model=model(2), nodes=nodes, default_link=DefaultLink(1e9))
    for objective in ("max-flow", "throughput"):
        found = answer(
            SolveConfig(
                cluster=profile, workload=WORKLOAD, objective=objective, concurrency=1, survive=1, time_limit_s=5
            )
        ).plan
        assert isinstance(found, Plan)
        assert set(found.placement) == {"fast", "spare"}
        assert not list(problems_of(profile, found))


def test_the_checker_names_the_nodes_whose_loss_ends_the_plan() -> None:
    nodes = tuple(table_node(name, [100.0]) for name in ("a", "b", "c"))
    profile = ClusterProfile(model=model(2), nodes=nodes, default_link=DefaultLink(1e9))
    found = answer(SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow")).plan
    assert isinstance(found, Plan)
    claimed = replace(found, assumptions=replace(found.assumptions, survive=1))
    said = "\n".join(problems_of(profile, claimed))
    assert "need an entry for each node" in said
    ends = [name for name in found.placement if f"after the loss of {name} no path" in said]
    assert len(ends) == (1 if len(found.placement) == 3 else 2)


def test_too_few_layers_for_two_of_each_is_proven() -> None:
    nodes = (table_node("a", [100.0, 60.0]), table_node("b", [100.0]))
    profile = ClusterProfile(model=model(2), nodes=nodes, default_link=DefaultLink(1e9))
    found = answer(SolveConfig(cluster=profile, workload=WORKLOAD, survive=1)).plan
    assert isinstance(found, Infeasible)
    assert "2 layers have to be held twice; all nodes together hold 3" in found.reason
    with pytest.raises(InputError, match="--survive 2: need 0 or 1"):
        SolveConfig(cluster=profile, workload=WORKLOAD, survive=2)


@pytest.mark.parametrize("regions", [1, 3])
def test_a_large_cluster_survives_at_a_price(regions: int) -> None:
    made = make_cluster(num_nodes=24, num_types=3, num_regions=regions, seed=1, num_layers=40)
    profile = without_labels(made, 0) if regions > 1 else made
    found = answer(
        SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow", survive=1, time_limit_s=10)
    ).plan
    assert isinstance(found, Plan)
    assert not list(problems_of(profile, found))
    survival = found.predicted.survival
    assert survival is not None
    assert survival.price_tokens_per_s is not None
    assert min(after.max_flow_tokens_per_s for after in survival.after_loss.values()) > 0
