"""A plan from a placement: its flows, what limits it, what to expect of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from profiler.records import digest, provenance_now
from profiler.stale import identity_of_node

from .batching import Batching, best_batching
from .bottleneck import describe
from .capacity import Capacities
from .expected import predict_means
from .flow import Flow, max_flow
from .marginal import marginals
from .network import LinkTable, build_network
from .plan import Assumptions, Expected, LayerRange, NodeFlow, Plan, Predicted, SolverFacts
from .rollout import MIN_REQUESTS, MIN_ROUNDS, can_roll_out, roll_out
from .routes import pipelines_of

Objective = Literal["throughput", "max-flow"]

SATURATED = 0.98
"""Of what the most requests in flight bring; beyond that, more of them only wait."""


MAX_FOLLOWED_HOPS = 1_500_000
"""Hops of tokens that one rollout follows at most, a few seconds' work; above it means alone are used, and noted."""

BATCHINGS_TRIED = 8
"""So many rollouts together may follow as many hops as one alone for all limits on iterations to be tried."""

REPORTED_REQUESTS = 288
"""Reported figures are counted over so many requests or more: with fewer the last 3 % are left to chance."""

NO_LIMITS = Batching()


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


def carrying(
    question: Question,
    placement: Mapping[str, LayerRange],
    *,
    spread: bool = False,
    links: LinkTable | None = None,
) -> Flow:
    """The largest flow of a placement under the question's rules."""
    return max_flow(question.capacities, placement, partial=question.partial, spread=spread, links=links)


def expected_of(
    question: Question,
    placement: Mapping[str, LayerRange],
    flow: Flow,
    concurrency: int | None,
    *,
    batching: Batching = NO_LIMITS,
    rounds: int = MIN_ROUNDS,
) -> Expected:
    """What the placement will deliver with so many requests in flight, routed by that flow.

    Measured nodes are rolled forward iteration by iteration; nodes with a capacity table, which say nothing of single
    iterations, are taken by their means.
    """
    capacities = question.capacities
    held = {name: placement[name] for name in used_nodes(placement, flow)}
    if is_followed(question, held, flow, concurrency):
        kv_tokens = {name: capacities.kv_tokens(name, held[name]) for name in held}
        return roll_out(
            capacities.profile,
            held,
            flow.links,
            capacities.workload,
            concurrency,
            kv_capacity_tokens=kv_tokens,
            max_decode_batch=batching.max_decode_batch,
            max_batch_tokens=batching.max_batch_tokens,
            rounds=rounds,
        )
    return predict_means(capacities, held, flow.links, concurrency)


def is_followed(
    question: Question, held: Mapping[str, LayerRange], flow: Flow, concurrency: int | None, *, times: int = 1
) -> bool:
    """Whether a rollout, or so many of them, is within reach: every node measured, not too many requests and hops."""
    if not can_roll_out(question.capacities.profile, held):
        return False
    mix = question.capacities.mix
    in_flight = predict_means(question.capacities, held, flow.links, concurrency).in_flight or 1.0
    requests = in_flight + max(MIN_ROUNDS * in_flight, MIN_REQUESTS)
    hops = sum(len(hops) * share for hops, share in pipelines_of(held, flow.links)) / flow.tokens_per_s
    return times * requests * mix.output_tokens * hops <= MAX_FOLLOWED_HOPS


def best_limits(
    question: Question, placement: Mapping[str, LayerRange], flow: Flow, *, thorough: bool
) -> tuple[Batching, Expected]:
    """The limits on iterations that bring the most, and what they bring; none where requests are not followed."""
    held = {name: placement[name] for name in used_nodes(placement, flow)}
    stages = max(len(pipeline) for pipeline, _ in pipelines_of(held, flow.links))
    times = BATCHINGS_TRIED if thorough else 1
    unlimited = expected_of(question, placement, flow, question.concurrency)
    if not is_followed(question, held, flow, question.concurrency):
        return NO_LIMITS, unlimited
    return best_batching(
        lambda batching: (
            unlimited
            if batching == NO_LIMITS
            else expected_of(question, placement, flow, question.concurrency, batching=batching)
        ),
        in_flight=unlimited.concurrency,
        stages=stages,
        mix=question.capacities.mix,
        max_batch_tokens=max(_max_batch_tokens(question.capacities, name) or 0 for name in held),
        thorough=thorough and is_followed(question, held, flow, question.concurrency, times=times),
    )


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
    batching, _ = best_limits(question, held, flow, thorough=True)
    network = build_network(capacities, held, partial=question.partial)
    return Plan(
        model=capacities.model.name,
        num_layers=capacities.model.num_layers,
        placement=held,
        flows=flow.links,
        nodes={
            name: NodeFlow(
                flow_tokens_per_s=flow.through(name),
                capacity_tokens_per_s=_capacity_at(capacities, name, held[name], flow),
                kv_capacity_tokens=capacities.kv_tokens(name, held[name]),
                max_batch_tokens=_max_batch_tokens(capacities, name, batching),
                device=capacities.nodes[name].device.name,
                region=capacities.nodes[name].region,
                made_on=identity_of_node(capacities.nodes[name]),
                reference_kernel_s=_reference_kernel_s(capacities, name),
            )
            for name in used
        },
        predicted=Predicted(
            max_flow_tokens_per_s=flow.tokens_per_s,
            upper_bound_tokens_per_s=bound,
            gap=(bound - flow.tokens_per_s) / flow.tokens_per_s,
            expected=_over_concurrency(question, held, flow, batching),
            bottleneck=describe(capacities, held, network, flow),
            marginal=marginals(network, flow),
        ),
        assumptions=Assumptions(
            workload=capacities.workload,
            partial_inference=question.partial,
            objective=question.objective,
            concurrency=question.concurrency,
            notes=(*notes, *_notes(question, held, flow)),
        ),
        solver=facts,
        cluster_digest=digest(capacities.profile),
        model_digest=capacities.model.digest,
        dtype=capacities.model.dtype,
        max_decode_batch=batching.max_decode_batch,
        provenance=provenance_now(inputs={"cluster": digest(capacities.profile)}),
    )


def _over_concurrency(
    question: Question, held: Mapping[str, LayerRange], flow: Flow, batching: Batching
) -> tuple[Expected, ...]:
    """Expected at 1, 2, 4, ... and at the number asked for, or at what the KV caches hold.

    The steps end where means alone say that more requests in flight bring no more.
    """
    capacities, asked = question.capacities, question.concurrency
    end = predict_means(capacities, held, flow.links, asked)
    steps, step = [], 1
    while step < end.concurrency:
        steps.append(step)
        if predict_means(capacities, held, flow.links, step).total_tokens_per_s >= SATURATED * end.total_tokens_per_s:
            break
        step *= 2
    return tuple(
        expected_of(
            question,
            held,
            flow,
            concurrency,
            batching=batching,
            rounds=max(MIN_ROUNDS, REPORTED_REQUESTS // (concurrency or REPORTED_REQUESTS)),
        )
        for concurrency in (*steps, asked)
    )


def _notes(question: Question, held: Mapping[str, LayerRange], flow: Flow) -> tuple[str, ...]:
    if not can_roll_out(question.capacities.profile, held):
        return (
            "nodes with only a capacity table say nothing of single iterations: expected is by means, the time of each "
            "token taken from the table as docs/solver.md says",
        )
    if not is_followed(question, held, flow, question.concurrency):
        return (
            "expected at the most requests in flight is by means alone, which promise up to a third more than is "
            "served: there are too many to follow one by one; give --concurrency for a closer figure",
        )
    return ()


def _capacity_at(capacities: Capacities, name: str, held: LayerRange, flow: Flow) -> float:
    """Tokens/s of a node whose requests enter in the flow's proportions: late ones need less of its time."""
    entries = [(entry, amount) for (node, entry), amount in flow.entries.items() if node == name]
    time = sum(amount / capacities.tokens_per_s(name, held, entry) for entry, amount in entries)
    return flow.through(name) / time


def _reference_kernel_s(capacities: Capacities, name: str) -> float | None:
    cost = capacities.nodes[name].cost
    return cost.reference_kernel_s if cost else None


def _max_batch_tokens(capacities: Capacities, name: str, batching: Batching = NO_LIMITS) -> int | None:
    cost = capacities.nodes[name].cost
    if cost is None:
        return None
    return min(cost.max_batch_tokens, batching.max_batch_tokens or cost.max_batch_tokens)
