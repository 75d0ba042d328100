"""Whether the plan is worth its nodes: one node alone against the plan, each under its own limits on iterations."""

from __future__ import annotations

import msgspec
import pytest

from helixbench.profiler.cluster import ClusterProfile, DefaultLink
from helixbench.solver.expected.simulated import best_limits, expected_of
from helixbench.solver.flow.max_flow import largest_flow
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Plan, SolverFacts
from helixbench.solver.problem.question import Question
from helixbench.solver.questions.assemble import assemble
from helixbench.solver.questions.verdict import WORTH, with_verdicts
from tests.solver.clusters import WORKLOAD, cost_node, model

FACTS = SolverFacts(method="auto", backend="", seconds=0.0, status="by hand")
WHOLE = {"big": LayerRange(0, 16)}


def chain_beside_one(*, speed: float, concurrency: int = 16) -> tuple[Question, dict[str, LayerRange]]:
    """Four nodes that hold a quarter of the layers each, beside one of speed 1 that holds all."""
    parts = [cost_node(f"part-{number}", speed=speed, max_layers=4) for number in range(4)]
    profile = ClusterProfile(
        model=model(16), nodes=(cost_node("big", max_layers=16), *parts), default_link=DefaultLink(1e8, 1e-3)
    )
    question = Question(Capacities(profile, WORKLOAD, concurrency=concurrency), "throughput", True)
    return question, {f"part-{number}": LayerRange(4 * number, 4 * number + 4) for number in range(4)}


def noted(question: Question, plan: Plan) -> list[str]:
    return [note for note in with_verdicts(question, plan).assumptions.notes if note.startswith("not worth")]


def test_a_chain_that_limits_make_worth_its_nodes_is_not_called_a_waste() -> None:
    question, chain = chain_beside_one(speed=0.7)
    plan = assemble(question, chain, bound=0.0, facts=FACTS)
    without = expected_of(question, chain, largest_flow(question, chain, spread=True), 16).total_tokens_per_s
    alone = expected_of(question, WHOLE, largest_flow(question, WHOLE), 16).total_tokens_per_s
    assert alone > without, "without limits on iterations the one node does better"
    assert plan.predicted.expected[-1].total_tokens_per_s > 1.1 * alone
    assert not noted(question, plan)


def test_a_chain_no_better_than_one_node_is_called_a_waste() -> None:
    question, chain = chain_beside_one(speed=0.4)
    (note,) = noted(question, assemble(question, chain, bound=0.0, facts=FACTS))
    assert "big alone gives" in note


@pytest.mark.parametrize(("share", "is_noted"), [(0.5, True), (1.1, False)])
def test_the_node_alone_has_its_own_best_limits(share: float, is_noted: bool) -> None:
    """``share``: where what the plan is worth lies between the one node without limits and with its best ones."""
    question, chain = chain_beside_one(speed=0.4, concurrency=64)
    flow = largest_flow(question, WHOLE)
    without = expected_of(question, WHOLE, flow, 64).total_tokens_per_s
    limits = best_limits(question, WHOLE, flow, thorough=False)
    assert limits is not None
    gained = limits.expected.total_tokens_per_s - without
    assert gained > 0.05 * without
    plan = assemble(question, chain, bound=0.0, facts=FACTS)
    *steps, end = plan.predicted.expected
    end = msgspec.structs.replace(end, total_tokens_per_s=(without + share * gained) / WORTH)
    plan = msgspec.structs.replace(plan, predicted=msgspec.structs.replace(plan.predicted, expected=(*steps, end)))
    assert bool(noted(question, plan)) == is_noted
