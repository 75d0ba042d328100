"""A plan from a placement: its flows, what limits it, what to expect of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from profiler.records import digest, provenance_now

from .bottleneck import describe
from .capacity import Capacities
from .expected import predict
from .flow import Flow, max_flow
from .plan import Assumptions, Expected, LayerRange, NodeFlow, Plan, Predicted, SolverFacts
from .rollout import can_roll_out, roll_out

Objective = Literal["throughput", "max-flow"]


@dataclass(frozen=True)
class Question:
    """What is asked: for which workload, how many requests in flight, and by which rules."""

    capacities: Capacities
    objective: Objective
    partial: bool

    @property
    def concurrency(self) -> int | None:
        """Requests in flight; ``None`` for as many as the KV caches hold."""
        return self.capacities.concurrency


def carrying(question: Question, placement: Mapping[str, LayerRange], *, spread: bool = False) -> Flow:
    """The largest flow of a placement under the question's rules."""
    return max_flow(question.capacities, placement, partial=question.partial, spread=spread)


def expected_of(
    question: Question, placement: Mapping[str, LayerRange], flow: Flow, concurrency: int | None
) -> Expected:
    """What the placement will deliver with so many requests in flight, routed by that flow.

    Measured nodes are rolled forward iteration by iteration; nodes with a capacity table, which say nothing of single
    iterations, are taken by their means.
    """
    capacities = question.capacities
    held = {name: placement[name] for name in used_nodes(placement, flow)}
    if can_roll_out(capacities.profile, held):
        kv_tokens = {name: capacities.kv_tokens(name, held[name]) for name in held}
        return roll_out(
            capacities.profile, held, flow.links, capacities.workload, concurrency, kv_capacity_tokens=kv_tokens
        )
    return predict(capacities.profile, held, flow.links, capacities.workload, concurrency, partial=question.partial)


def used_nodes(placement: Mapping[str, LayerRange], flow: Flow) -> list[str]:
    """The nodes that carry some of the flow, in order."""
    carrying_some = {name for name, _ in flow.entries}
    return sorted(name for name in placement if name in carrying_some)


def assemble(
    question: Question,
    placement: Mapping[str, LayerRange],
    *,
    bound: float,
    facts: SolverFacts,
    notes: tuple[str, ...] = (),
) -> Plan:
    """The plan of a placement that carries something. Nodes that carry nothing are left out.

    Args:
        question: what was asked.
        placement: node -> layer range.
        bound: proven tokens/s that no placement exceeds.
        facts: how it was found.
        notes: remarks to keep with the assumptions.
    """
    capacities = question.capacities
    flow = carrying(question, placement, spread=True)
    used = used_nodes(placement, flow)
    held = {name: placement[name] for name in used}
    bound = max(bound, flow.tokens_per_s)
    return Plan(
        model=capacities.model.name,
        num_layers=capacities.model.num_layers,
        placement=held,
        flows=flow.links,
        nodes={
            name: NodeFlow(
                flow_tokens_per_s=flow.through(name),
                capacity_tokens_per_s=capacities.tokens_per_s(name, held[name]),
                kv_capacity_tokens=capacities.kv_tokens(name, held[name]),
                max_batch_tokens=_max_batch_tokens(capacities, name),
            )
            for name in used
        },
        predicted=Predicted(
            max_flow_tokens_per_s=flow.tokens_per_s,
            upper_bound_tokens_per_s=bound,
            gap=(bound - flow.tokens_per_s) / flow.tokens_per_s,
            expected=_over_concurrency(question, held, flow),
            bottleneck=describe(capacities, held, flow),
        ),
        assumptions=Assumptions(
            workload=capacities.workload,
            partial_inference=question.partial,
            objective=question.objective,
            concurrency=question.concurrency,
            notes=notes,
        ),
        solver=facts,
        cluster_digest=digest(capacities.profile),
        model_digest=capacities.model.digest,
        dtype=capacities.model.dtype,
        provenance=provenance_now(inputs={"cluster": digest(capacities.profile)}),
    )


def _over_concurrency(question: Question, held: Mapping[str, LayerRange], flow: Flow) -> tuple[Expected, ...]:
    """Expected at 1, 2, 4, ... and at the number asked for, or at what the KV caches hold."""
    asked = expected_of(question, held, flow, question.concurrency)
    steps = [1]
    while steps[-1] * 2 < asked.concurrency:
        steps.append(steps[-1] * 2)
    below = [expected_of(question, held, flow, step) for step in steps if step < asked.concurrency]
    return (*below, asked)


def _max_batch_tokens(capacities: Capacities, name: str) -> int | None:
    cost = capacities.nodes[name].cost
    return cost.max_batch_tokens if cost else None
