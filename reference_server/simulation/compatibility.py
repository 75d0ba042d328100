"""Checks that plan, cluster, load and events of a simulation fit together, before anything runs."""

from __future__ import annotations

import math

from helixbench.errors import InputError
from helixbench.profiler.cluster import COORDINATOR, ClusterProfile
from helixbench.records import digest
from helixbench.reference_server.simulation.config import SimulationConfig
from helixbench.solver.problem.capacity import kv_capacity_tokens
from helixbench.solver.problem.plan import Plan
from helixbench.solver.simulation.events import Event, LinkEvent, NodeJoins

OTHER_CLUSTER_NOTE = "the plan was made for a different cluster profile"


def require_fit(
    plan: Plan,
    profile: ClusterProfile,
    config: SimulationConfig,
    *,
    plan_file: str = "plan",
    cluster_file: str = "cluster",
    events_file: str = "events",
) -> None:
    """Refuse what does not fit together; errors name the three files by these names.

    Raises:
        InputError: naming file, node, field and remedy.
    """
    _require_load(config)
    _require_held(plan, profile, plan_file, cluster_file)
    for event in config.events:
        _require_event(event, plan, profile, f"{events_file}: at_s {event.at_s:g}")


def notes_on_fit(plan: Plan, profile: ClusterProfile) -> list[str]:
    """Remarks on what is allowed but unusual."""
    is_other = bool(plan.cluster_digest) and plan.cluster_digest != digest(profile)
    return [OTHER_CLUSTER_NOTE] if is_other else []


def _require_load(config: SimulationConfig) -> None:
    if config.arrivals.kind == "closed loop" and config.concurrency is None:
        raise InputError("a closed loop needs --concurrency: the requests in flight")
    if config.duration_s is None and config.num_requests is None:
        raise InputError("need --duration-s or --requests: when does the run end?")
    if not 0 <= config.warmup_s < math.inf:
        raise InputError(f"warmup_s (--warmup-s) is {config.warmup_s:g}: need a finite number of seconds, at least 0")
    if config.duration_s is not None and not 0 < config.duration_s < math.inf:
        raise InputError(
            f"duration_s (--duration-s) is {config.duration_s:g}: need a finite number of seconds, more than 0"
        )


def _require_held(plan: Plan, profile: ClusterProfile, plan_file: str, cluster_file: str) -> None:
    """Every node of the plan is in the cluster and can hold what the plan puts on it."""
    known = {node.name: node for node in profile.nodes}
    missing = sorted(set(plan.placement) - set(known))
    if missing:
        raise InputError(
            f"{plan_file}: placement names {', '.join(missing)}, which the cluster does not have ({cluster_file}); "
            "give the cluster that the plan was made for"
        )
    if plan.num_layers != profile.model.num_layers:
        raise InputError(
            f"{plan_file}: num_layers is {plan.num_layers}, but the model of {cluster_file} has "
            f"{profile.model.num_layers}; give the cluster that the plan was made for"
        )
    for name, held in sorted(plan.placement.items()):
        node = known[name]
        if held.num_layers > node.max_layers:
            table = "" if node.cost is not None else ", and its capacity_tokens_per_s has no more values"
            raise InputError(
                f"{plan_file}: placement.{name} holds {held.num_layers} layers, {held}, but max_layers of {name} in "
                f"{cluster_file} is {node.max_layers}{table}; solve for this cluster"
            )
        planned = plan.nodes[name].kv_capacity_tokens
        room = kv_capacity_tokens(profile.model, node, held)
        if planned is not None and planned > room:
            raise InputError(
                f"{plan_file}: nodes.{name}.kv_capacity_tokens is {planned}, but beside {held} there is room for "
                f"{room} in device.memory_bytes of {name} in {cluster_file}; solve for this cluster"
            )


def _require_event(event: Event, plan: Plan, profile: ClusterProfile, where: str) -> None:
    known = {node.name for node in profile.nodes}
    if isinstance(event, LinkEvent):
        for name in (event.src, event.dst):
            if name not in known | {COORDINATOR}:
                raise InputError(f"{where} names {name!r}, which the cluster does not have")
        if event.src == event.dst or profile.link(event.src, event.dst) is None:
            raise InputError(
                f"{where} names the link {event.src} -> {event.dst}, which the cluster does not have; "
                "name two nodes that `links` or `default_link` connects"
            )
        return
    if event.node not in known:
        raise InputError(f"{where} names {event.node!r}, which the cluster does not have")
    if not isinstance(event, NodeJoins) and event.node not in plan.placement:
        raise InputError(f"{where} names {event.node!r}, which the plan does not use")
