"""What limits a plan, in words and in numbers that solving again bears out."""

from __future__ import annotations

import msgspec
import pytest

from helixbench.profiler.cluster import ClusterProfile, Coordinator, DefaultLink, Link
from helixbench.solver import Plan, solve_placement
from helixbench.solver.flow.marginal import STEP, marginals, one_more_in_words, one_more_of_each
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.flow.network import build_network
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, OneMore, SolverFacts
from helixbench.solver.problem.question import Question
from helixbench.solver.questions.assemble import assemble
from helixbench.solver.questions.request import PlanRequest, answer, with_one_more
from tests.solver.brute_force import largest_flow
from tests.solver.clusters import WORKLOAD, model, random_cluster, table_node

FACTS = SolverFacts(method="by hand", backend="", seconds=0.0, status="done")


def plan_by_hand(profile: ClusterProfile, placement: dict[str, LayerRange]) -> Plan:
    question = Question(Capacities(profile, WORKLOAD), "max-flow", True)
    return assemble(question, placement, bound=0.0, facts=FACTS)


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
        "network card of coordinator is full, sending, 1% more there adds 1.00%",
    )


@pytest.mark.parametrize("seed", [2, 6, 8, 12, 13, 21])
def test_marginal_values_are_those_of_the_changed_cluster(seed: int) -> None:
    """Independent of the solver's own LP: the cluster with a node 1 % faster, solved as docs/design/bounds.md says."""
    profile = random_cluster(seed)
    found = solve_placement(profile, WORKLOAD, objective="max-flow", time_limit_s=3)
    assert isinstance(found, Plan)
    capacities = Capacities(profile, WORKLOAD)
    flow = max_flow(capacities, found.placement, partial=True, spread=True)
    values = marginals(build_network(capacities, found.placement, partial=True), flow)
    assert values, "something limits every flow"

    for value in values:
        if value.resource != "node":
            continue
        for factor, change in ((1 + STEP, value.gain_tokens_per_s), (1 - STEP, -value.loss_tokens_per_s)):
            changed = _OneChanged(profile, value.name, factor)
            again = largest_flow(changed, dict(found.placement), partial=True)
            assert again - flow.tokens_per_s == pytest.approx(change, abs=1e-5 * flow.tokens_per_s)


class _OneChanged(Capacities):
    """The cluster with one node faster or slower."""

    def __init__(self, profile: ClusterProfile, changed: str, factor: float) -> None:
        super().__init__(profile, WORKLOAD)
        self._changed, self._factor = changed, factor

    def tokens_per_s(self, name: str, held: LayerRange, entry: int | None = None) -> float:
        rate = super().tokens_per_s(name, held, entry)
        return rate * self._factor if name == self._changed else rate


def test_one_more_of_each_type_is_what_a_search_on_that_cluster_finds() -> None:
    nodes = (table_node("slow", [40.0, 20.0]), table_node("fast", [100.0, 90.0, 80.0]))
    profile = ClusterProfile(model=model(5), nodes=nodes, default_link=DefaultLink(1e9))
    request = PlanRequest(profile=profile, workload=WORKLOAD, objective="max-flow")
    plan = answer(request)
    assert isinstance(plan, Plan)
    assert plan.predicted.max_flow_tokens_per_s == pytest.approx(20.0)
    wiser = with_one_more(request, plan, seconds=10)
    by_device = {more.device: more for more in wiser.predicted.one_more}
    assert by_device["gpu3"].tokens_per_s == pytest.approx(80.0)
    assert by_device["gpu3"].gain == pytest.approx(3.0)
    assert by_device["gpu2"].gain == pytest.approx(1.0)
    assert all(more.is_optimal for more in wiser.predicted.one_more)
    assert "one more gpu3 adds 300.0% (max-flow 80.0 tokens/s)" in wiser.predicted.bottleneck
    assert wiser.placement == plan.placement


def test_what_was_not_proven_is_not_called_nothing() -> None:
    found = [
        OneMore(device="L4", tokens_per_s=10.0, gain=0.0, is_optimal=False, seconds=2.0),
        OneMore(device="T4", tokens_per_s=11.0, gain=0.1, is_optimal=False, seconds=2.0),
        OneMore(device="A10", tokens_per_s=10.0, gain=0.0, is_optimal=True, seconds=2.0),
    ]
    assert list(one_more_in_words(found, "max-flow")) == [
        "one more L4 adds nothing that was found in 2.0 s",
        "one more T4 adds at least 10.0% (max-flow 11.0 tokens/s)",
        "one more A10 adds nothing",
    ]


def test_ctrl_c_ends_the_searches_and_keeps_those_done() -> None:
    profile, placement = in_a_row(100.0, 50.0)
    plan = plan_by_hand(profile, placement)

    def interrupted(on: ClusterProfile, seconds: float) -> Plan:
        assert len(on.nodes) == 3
        cut_short = SolverFacts(method="auto", backend="", seconds=0.0, status="interrupted")
        return msgspec.structs.replace(plan, solver=cut_short)

    assert list(one_more_of_each(interrupted, profile, plan, seconds=1)) == []
