"""A plan from a placement: its flows, what limits it, what to expect of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from helixbench.profiler.staleness import identity_of_node
from helixbench.records import digest, provenance_now
from helixbench.solver.expected.analytic import predict_analytically
from helixbench.solver.expected.batch_limits import Batching
from helixbench.solver.expected.curve import expected_curve
from helixbench.solver.expected.simulated import (
    NO_LIMITS,
    RANKED,
    Budget,
    Effort,
    best_limits,
    expected_of,
    max_batch_tokens,
)
from helixbench.solver.flow.bottleneck import describe
from helixbench.solver.flow.marginal import marginals
from helixbench.solver.flow.max_flow import Flow, max_flow
from helixbench.solver.flow.network import build_network
from helixbench.solver.flow.survival import without
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import (
    AfterLoss,
    Assumptions,
    Expected,
    LayerRange,
    NodeFlow,
    Objective,
    Placement,
    Plan,
    Predicted,
    SolverFacts,
    Survival,
)
from helixbench.solver.problem.regions import region_notes
from helixbench.solver.problem.tables import TABLE_NOTE

MOST_FOR_LIMITS = 0.35
"""Share of the work of simulations for the comparison of limits on iterations."""

WORK_AFTER_LOSSES = 600_000
"""Events and tokens of the simulations of what is left after each loss, all together: some two seconds."""

LEAST_WORK_AFTER_LOSS = 10_000
"""The same of one of them at least."""

CUT_SHORT_NOTE = (
    "expected throughput is computed analytically and can be a third off, and no batch limits were searched: "
    "the plan was interrupted before it was simulated"
)


def interrupted(plan: Plan) -> Plan:
    """The plan of a search that Ctrl-C ended."""
    return msgspec.structs.replace(plan, solver=msgspec.structs.replace(plan.solver, status="interrupted"))


def assemble(
    capacities: Capacities,
    placement: Mapping[str, LayerRange],
    *,
    objective: Objective,
    bound: float,
    facts: SolverFacts,
    budget: Budget,
    notes: tuple[str, ...] = (),
    is_analytic: bool = False,
) -> Plan:
    """The plan of a placement that carries something. Nodes that carry nothing, even after a loss, are left out.

    Args:
        capacities: of the nodes, for what was asked.
        placement: node -> layer range.
        objective: of the search.
        bound: proven tokens/s that no placement exceeds.
        facts: how it was found.
        budget: of the simulations.
        notes: remarks to keep with the assumptions.
        is_analytic: compute what is expected analytically, without simulation.
    """
    flow = max_flow(capacities, placement, spread=True)
    used = flow.used(placement)
    held = _kept(capacities, placement, flow) if capacities.survive else used
    bound = max(bound, flow.tokens_per_s)
    has_tables = any(capacities.nodes[name].cost is None for name in held)
    limits, part = None, budget.part(MOST_FOR_LIMITS)
    if not (is_analytic or has_tables):
        limits = best_limits(capacities, held, flow, part, thorough=True)
        if limits is None:  # requests group so little that a short simulation does not see a round
            longer = replace(RANKED, max_work=part.left // 3)
            limits = best_limits(capacities, held, flow, part, thorough=False, effort=longer)
    batching = NO_LIMITS if limits is None else limits.batching
    network = build_network(capacities, held)
    expected: tuple[Expected, ...]
    remarks: tuple[str, ...]
    if is_analytic:
        expected, remarks = (predict_analytically(capacities, used, flow.links, capacities.concurrency),), ()
    else:
        expected, remarks = expected_curve(
            capacities, used, flow, batching, budget, at_first=None if limits is None else limits.expected
        )
    survival = None
    if capacities.survive:
        survival = _survival(capacities, held, batching, is_analytic=is_analytic)
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
                max_batch_tokens=max_batch_tokens(capacities, name, batching),
                device=capacities.nodes[name].device.label,
                region=capacities.regions[name],
                made_on=identity_of_node(capacities.nodes[name]),
            )
            for name in held
        },
        predicted=Predicted(
            max_flow_tokens_per_s=flow.tokens_per_s,
            upper_bound_tokens_per_s=bound,
            gap=(bound - flow.tokens_per_s) / flow.tokens_per_s,
            expected=expected,
            bottleneck=describe(capacities, network, flow),
            marginal=marginals(network, flow),
            survival=survival,
        ),
        assumptions=Assumptions(
            workload=capacities.workload,
            partial_inference=capacities.partial,
            objective=objective,
            survive=capacities.survive,
            concurrency=capacities.concurrency,
            notes=(
                *notes,
                *capacities.workload.notes,
                *remarks,
                *([TABLE_NOTE] if has_tables else []),
                *_emulated(capacities, held),
                *region_notes(capacities.profile, capacities.regions),
            ),
        ),
        solver=facts,
        cluster_digest=digest(capacities.profile),
        model_digest=capacities.model.digest,
        dtype=capacities.model.dtype,
        max_decode_batch=batching.max_decode_batch,
        cluster=capacities.profile.without_samples() if capacities.profile.is_measured else None,
        provenance=provenance_now(inputs={"cluster": digest(capacities.profile)}),
    )


def _kept(capacities: Capacities, placement: Mapping[str, LayerRange], flow: Flow) -> Placement:
    """The placement without the nodes that carry nothing, not even after the loss of another one."""
    used = flow.used(placement)
    for lost in placement:
        left = without(placement, lost)
        used |= max_flow(capacities, left).used(left)
    return dict(sorted(used.items()))


def _survival(
    capacities: Capacities, held: Mapping[str, LayerRange], batching: Batching, *, is_analytic: bool
) -> Survival:
    """What is left of a placement after the loss of each of its nodes."""
    effort = Effort(max_work=max(LEAST_WORK_AFTER_LOSS, WORK_AFTER_LOSSES // len(held)))
    after = {}
    for lost in held:
        left = without(held, lost)
        flow = max_flow(capacities, left, spread=True)
        asked = capacities.concurrency
        if is_analytic:
            expected = predict_analytically(capacities, flow.used(left), flow.links, asked)
        else:
            expected = expected_of(capacities, left, flow, asked, batching=batching, effort=effort)
        after[lost] = AfterLoss(
            max_flow_tokens_per_s=flow.tokens_per_s, expected_tokens_per_s=expected.total_tokens_per_s
        )
    return Survival(after_loss=after)


def _emulated(capacities: Capacities, held: Mapping[str, LayerRange]) -> list[str]:
    """A note on the devices that were emulated when the cluster was profiled."""
    devices = (capacities.nodes[name].device for name in held)
    labels = sorted({device.label for device in devices if device.kind == "emulated"})
    return [f"devices that were not there when the cluster was profiled: {', '.join(labels)}"] if labels else []


def _capacity_at(capacities: Capacities, name: str, held: LayerRange, flow: Flow) -> float:
    """Tokens/s of a node whose requests enter in the flow's proportions: late ones need less of its time."""
    entries = [(entry, amount) for (node, entry), amount in flow.entries.items() if node == name]
    if not entries:
        return capacities.tokens_per_s(name, held)
    time = sum(amount / capacities.tokens_per_s(name, held, entry) for entry, amount in entries)
    return flow.through(name) / time
