"""Checks a plan from its cluster profile alone, trusting nothing that the search computed.

Every plan passes here before it is written. A check recomputes what it needs; it shares the capacities, which are
the question, and none of the code that looks for the answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from helixbench.errors import HelixbenchError
from helixbench.profiler.cluster import COORDINATOR, ClusterProfile
from helixbench.solver.problem.capacity import Capacities, held_bytes
from helixbench.solver.problem.plan import Plan

TOLERANCE = 1e-6
"""Relative; flows come from a linear program solved in floating point."""


class PlanError(HelixbenchError):
    """A plan contradicts its cluster profile; the message lists every contradiction."""


def require_sound(profile: ClusterProfile, plan: Plan) -> None:
    """Refuse a plan that its profile does not bear out.

    Raises:
        PlanError: listing every contradiction.
    """
    problems = list(problems_of(profile, plan))
    if problems:
        raise PlanError("the plan does not hold on this cluster:\n  " + "\n  ".join(problems))


def problems_of(profile: ClusterProfile, plan: Plan) -> Iterator[str]:
    """Every way in which the plan contradicts the profile, one sentence each; none for a sound plan."""
    known = {node.name for node in profile.nodes}
    strangers = sorted(set(plan.placement) - known)
    if strangers:
        yield f"placement: {', '.join(strangers)} is no node of the cluster"
        return
    if plan.num_layers != profile.model.num_layers:
        yield f"num_layers: the plan has {plan.num_layers}, the cluster's model {profile.model.num_layers}"
        return
    capacities = Capacities(profile, plan.assumptions.workload, concurrency=plan.assumptions.concurrency)
    yield from _memory(capacities, plan)
    yield from _alternatives(profile, plan)
    yield from _links(profile, plan)
    yield from _conservation(plan)
    yield from _node_capacity(capacities, plan)
    yield from _nics(profile, plan)
    yield from _claims(plan)
    if plan.assumptions.survive:
        yield from _losses(profile, plan)


def _memory(capacities: Capacities, plan: Plan) -> Iterator[str]:
    for name, held in plan.placement.items():
        node = capacities.nodes[name]
        if not capacities.can_hold(name, held):
            needs, has = held_bytes(capacities.model, node, held), node.device.memory_bytes
            yield (
                f"placement.{name}: {held} does not fit: {held.num_layers} of at most {node.max_layers} layers, "
                f"{needs:.4g} of {has:.4g} bytes before any KV cache, KV cache of "
                f"{capacities.kv_tokens(name, held)} tokens for requests of up to {capacities.mix.max_kv_tokens}"
            )
        claimed = plan.nodes[name].kv_capacity_tokens
        if claimed is not None and claimed != capacities.kv_tokens(name, held):
            yield f"nodes.{name}.kv_capacity_tokens: {claimed}, but {capacities.kv_tokens(name, held)} fit"


def _alternatives(profile: ClusterProfile, plan: Plan) -> Iterator[str]:
    used: defaultdict[str, list[str]] = defaultdict(list)
    for node in profile.nodes:
        if node.exclusive_group and node.name in plan.placement:
            used[node.exclusive_group].append(node.name)
    for group, names in used.items():
        if len(names) > 1:
            yield f"placement: {', '.join(names)} are in exclusive group {group}, of which one node may be used"


def _links(profile: ClusterProfile, plan: Plan) -> Iterator[str]:
    partial = plan.assumptions.partial_inference
    own = {(link.src, link.dst): link.bandwidth_bytes_per_s for link in profile.links}
    default = None if profile.default_link is None else profile.default_link.bandwidth_bytes_per_s
    for flow in plan.flows:
        where = f"flows {flow.src} -> {flow.dst}"
        leaves_at = 0 if flow.src == COORDINATOR else plan.placement[flow.src].end
        if flow.dst == COORDINATOR:
            fits = leaves_at == plan.num_layers
        else:
            held = plan.placement[flow.dst]
            fits = held.start <= leaves_at < held.end if partial else held.start == leaves_at
        if not fits:
            yield f"{where}: a request that leaves at layer {leaves_at} cannot go on there"
        bandwidth = own.get((flow.src, flow.dst), default)
        if bandwidth is None:
            yield f"{where}: these two are not connected"
            continue
        capacity = bandwidth / profile.bytes_per_token(flow.src, flow.dst)
        if not _close(flow.capacity_tokens_per_s, capacity):
            yield f"{where}: capacity {flow.capacity_tokens_per_s:.6g} tokens/s, but the link carries {capacity:.6g}"
        if flow.flow_tokens_per_s > capacity * (1 + TOLERANCE):
            yield f"{where}: flow {flow.flow_tokens_per_s:.6g} tokens/s, but the link carries {capacity:.6g}"
        if flow.flow_tokens_per_s < 0:
            yield f"{where}: negative flow {flow.flow_tokens_per_s:.6g} tokens/s"


def _conservation(plan: Plan) -> Iterator[str]:
    into: defaultdict[str, float] = defaultdict(float)
    out_of: defaultdict[str, float] = defaultdict(float)
    for flow in plan.flows:
        into[flow.dst] += flow.flow_tokens_per_s
        out_of[flow.src] += flow.flow_tokens_per_s
    slack = TOLERANCE * max(out_of[COORDINATOR], 1e-9)
    for name in (COORDINATOR, *plan.placement):
        if abs(into[name] - out_of[name]) > slack:
            yield f"flows: {into[name]:.6g} tokens/s enter {name}, {out_of[name]:.6g} leave it"
    for name, node in plan.nodes.items():
        if abs(node.flow_tokens_per_s - into[name]) > slack:
            yield f"nodes.{name}.flow_tokens_per_s: {node.flow_tokens_per_s:.6g}, but its links bring {into[name]:.6g}"


def _node_capacity(capacities: Capacities, plan: Plan) -> Iterator[str]:
    load: defaultdict[str, float] = defaultdict(float)
    for flow in plan.flows:
        if flow.dst == COORDINATOR:
            continue
        entry = 0 if flow.src == COORDINATOR else plan.placement[flow.src].end
        held = plan.placement[flow.dst]
        if held.start <= entry < held.end and capacities.can_hold(flow.dst, held):
            load[flow.dst] += flow.flow_tokens_per_s / capacities.tokens_per_s(flow.dst, held, entry)
    for name, held in plan.placement.items():
        if not capacities.can_hold(name, held):
            continue  # said already
        capacity = capacities.tokens_per_s(name, held)
        if load[name]:
            capacity = plan.nodes[name].flow_tokens_per_s / load[name]
        if load[name] > 1 + TOLERANCE:
            yield f"nodes.{name}: its flow needs {load[name]:.6g} times what it can do"
        if not _close(plan.nodes[name].capacity_tokens_per_s, capacity):
            yield (
                f"nodes.{name}.capacity_tokens_per_s: {plan.nodes[name].capacity_tokens_per_s:.6g}, "
                f"but {held}, entered as the flows do, gives {capacity:.6g}"
            )


def _nics(profile: ClusterProfile, plan: Plan) -> Iterator[str]:
    sent: defaultdict[str, float] = defaultdict(float)
    received: defaultdict[str, float] = defaultdict(float)
    for flow in plan.flows:
        size = flow.flow_tokens_per_s * profile.bytes_per_token(flow.src, flow.dst)
        sent[flow.src] += size
        received[flow.dst] += size
    nics = {node.name: (node.nic_out_bytes_per_s, node.nic_in_bytes_per_s) for node in profile.nodes}
    nics[COORDINATOR] = (profile.coordinator.nic_out_bytes_per_s, profile.coordinator.nic_in_bytes_per_s)
    for name in (COORDINATOR, *plan.placement):
        for used, limit, way in ((sent[name], nics[name][0], "out"), (received[name], nics[name][1], "in")):
            if limit is not None and used > limit * (1 + TOLERANCE):
                yield f"nodes.{name}: {used:.6g} bytes/s go {way}, but its NIC carries {limit:.6g}"


def _losses(profile: ClusterProfile, plan: Plan) -> Iterator[str]:
    """Nodes without which no path of ranges and links leads from the coordinator through all layers and back."""
    survival = plan.predicted.survival
    if survival is None or set(survival.after_loss) != set(plan.placement):
        yield "predicted.survival.after_loss: need an entry for each node of `placement`, for assumptions.survive is 1"
    own = {(link.src, link.dst) for link in profile.links}

    def linked(src: str, dst: str) -> bool:
        return profile.default_link is not None or (src, dst) in own

    for lost in plan.placement:
        left = {name: held for name, held in plan.placement.items() if name != lost}
        reached = {name for name, held in left.items() if held.start == 0 and linked(COORDINATOR, name)}
        for _ in left:  # no path is longer
            ends = [(name, left[name].end) for name in reached]
            reached |= {
                name
                for name, held in left.items()
                for src, at in ends
                if (held.start == at or (plan.assumptions.partial_inference and held.start < at < held.end))
                and src != name
                and linked(src, name)
            }
        if not any(left[name].end == plan.num_layers and linked(name, COORDINATOR) for name in reached):
            yield f"placement: after the loss of {lost} no path through all layers is left (assumptions.survive is 1)"


def _claims(plan: Plan) -> Iterator[str]:
    carried = sum(flow.flow_tokens_per_s for flow in plan.flows if flow.src == COORDINATOR)
    claimed, bound = plan.predicted.max_flow_tokens_per_s, plan.predicted.upper_bound_tokens_per_s
    if not _close(carried, claimed):
        yield f"predicted.max_flow_tokens_per_s: {claimed:.6g}, but the flows carry {carried:.6g}"
    if bound < claimed * (1 - TOLERANCE):
        yield f"predicted.upper_bound_tokens_per_s: {bound:.6g} is below the plan's own {claimed:.6g}"
    if claimed > 0 and abs(plan.predicted.gap - max(0.0, bound - claimed) / claimed) > TOLERANCE:
        yield f"predicted.gap: {plan.predicted.gap:.6g}, but bound and max-flow give {(bound - claimed) / claimed:.6g}"


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b), 1e-9)
