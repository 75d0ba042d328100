"""What limits a plan, in words and in numbers that solving again bears out."""

from __future__ import annotations

import pytest

from helixbench.profiler.cluster import ClusterProfile, Coordinator, DefaultLink, Link
from helixbench.solver import Plan, SolveConfig, solve_placement
from helixbench.solver.expected.simulated import Budget
from helixbench.solver.flow.marginal import STEP, marginals
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.flow.network import build_network
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, SolverFacts
from helixbench.solver.questions.assemble import assemble
from tests.solver.brute_force import largest_flow
from tests.solver.clusters import WORKLOAD, model, random_cluster, table_node

FACTS = SolverFacts(method="by hand", backend="", seconds=0.0, status="not searched")


def plan_by_hand(profile: ClusterProfile, placement: dict[str, LayerRange]) -> Plan:
    capacities = Capacities(profile, WORKLOAD)
    return assemble(capacities, placement, objective="max-flow", bound=0.0, facts=FACTS, budget=Budget(100_000))


def in_a_row(*rates: float, links: tuple[Link, ...] = ()) -> tuple[ClusterProfile, dict[str, LayerRange]]:
    """One node of each rate for each layer, one after the other."""
    nodes = tuple(table_node(f"n{i}", [rate]) for i, rate in enumerate(rates))
    profile = ClusterProfile(model=model(len(rates)), nodes=nodes, links=links, default_link=DefaultLink(1e9))
    return profile, {f"n{i}": LayerRange(i, i + 1) for i in range(len(rates))}


def test_the_only_bottleneck_gains_and_loses_in_proportion() -> None:
    plan = plan_by_hand(*in_a_row(100.0, 50.0, 80.0))
    (value,) = plan.predicted.marginal
    assert (value.resource, value.name) == ("node", "n1")
    assert value.gain_tokens_per_s == pytest.approx(0.5)
    assert value.loss_tokens_per_s == pytest.approx(0.5)
    assert plan.predicted.bottleneck == ("gpu1 holds layers [1,2) at 100% (n1), 1% more there adds 1.00%",)


def test_of_equal_bottlenecks_in_a_row_none_alone_is_worth_more_and_all_are_named() -> None:
    plan = plan_by_hand(*in_a_row(50.0, 50.0, 80.0))
    assert {value.name: value.gain_tokens_per_s for value in plan.predicted.marginal} == {"n0": 0.0, "n1": 0.0}
    assert all(value.loss_tokens_per_s == pytest.approx(0.5) for value in plan.predicted.marginal)
    assert plan.predicted.bottleneck == ("gpu1s hold layers [0,2) at 100% (n0, n1), 1% more there adds 1.00%",)


def test_a_full_link_and_a_full_card_are_named() -> None:
    link = Link(src="n0", dst="n1", bandwidth_bytes_per_s=30e3)
    plan = plan_by_hand(*in_a_row(100.0, 50.0, links=(link,)))
    assert plan.predicted.bottleneck == ("link n0 -> n1 is full, 1% more there adds 1.00%",)
    profile, placement = in_a_row(100.0, 50.0)
    card = ClusterProfile(
        model=profile.model,
        nodes=profile.nodes,
        default_link=profile.default_link,
        coordinator=Coordinator(nic_out_bytes_per_s=40.0),
    )
    assert plan_by_hand(card, placement).predicted.bottleneck == (
        "NIC of coordinator is full, sending, 1% more there adds 1.00%",
    )


@pytest.mark.parametrize("seed", [2, 6, 8, 12, 13, 21])
def test_marginal_values_are_those_of_the_changed_cluster(seed: int) -> None:
    """Independent of the solver's own LP: the cluster with a node 1 % faster, solved as docs/design/bounds.md says."""
    profile = random_cluster(seed)
    found = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow", time_limit_s=3))
    assert isinstance(found, Plan)
    capacities = Capacities(profile, WORKLOAD)
    flow = max_flow(capacities, found.placement, spread=True)
    values = marginals(build_network(capacities, found.placement), flow)
    assert values, "something limits every flow"

    for value in values:
        if value.resource != "node":
            continue
        for factor, change in ((1 + STEP, value.gain_tokens_per_s), (1 - STEP, -value.loss_tokens_per_s)):
            changed = _OneChanged(profile, value.name, factor)
            again = largest_flow(changed, dict(found.placement))
            assert again - flow.tokens_per_s == pytest.approx(change, abs=1e-5 * flow.tokens_per_s)


class _OneChanged(Capacities):
    """The cluster with one node faster or slower."""

    def __init__(self, profile: ClusterProfile, changed: str, factor: float) -> None:
        super().__init__(profile, WORKLOAD)
        self._changed, self._factor = changed, factor

    def tokens_per_s(self, name: str, held: LayerRange, entry: int | None = None) -> float:
        rate = super().tokens_per_s(name, held, entry)
        return rate * self._factor if name == self._changed else rate
