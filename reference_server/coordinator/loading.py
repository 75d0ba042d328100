"""Loading a plan onto agents: each its layer range, and the engine that serves them."""

from __future__ import annotations

import getpass
import os
import secrets
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from helixbench.errors import InputError
from helixbench.profiler.cluster import COORDINATOR, ClusterProfile
from helixbench.profiler.cost.model import BatchShape
from helixbench.profiler.model.model import Model
from helixbench.reference_server.coordinator.adaptation import Adaptation, Adapted
from helixbench.reference_server.coordinator.engine import Engine
from helixbench.reference_server.coordinator.options import AdaptOptions
from helixbench.reference_server.testbed.emulation import Timing
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.messages import Load, Loaded
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Hop, Plan
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.recover import Paths, Seconds, by_layers
from helixbench.solver.scheduling.router import Router
from helixbench.solver.scheduling.routings import make_router
from helixbench.solver.scheduling.work import Routing

_LOAD_TIMEOUT_S = 300.0


def load_plan(
    agents: Agents,
    plan: Plan,
    files: Model,
    *,
    routing: Routing = "iwrr",
    seed: int = 0,
    max_concurrency: int | None = None,
    timing: Timing = Timing(),  # noqa: B008 - frozen
    options: AdaptOptions = AdaptOptions(),  # noqa: B008 - frozen
) -> Engine:
    """Let every agent load its layer range, and give the engine that serves the plan.

    Args:
        agents: of the plan's nodes, and no others.
        plan: what to serve.
        files: the model.
        routing: how pipelines are chosen.
        seed: of routings that draw.
        max_concurrency: requests in flight at most.
        timing: of the testbed.
        options: how it is adapted to what happens.

    Raises:
        InputError: a plan of a cluster that was not measured here, so that it does not say how to serve it.
        AgentFailedError: a range does not fit, or the model differs on a node.
        MeasurementError: an agent does not answer.
    """
    served = _Served(agents, files, timing, options, run=secrets.token_hex(8))
    router = make_router(plan, routing, seed=seed, is_connected=_connections(plan.cluster))
    adapted = served.adapted(plan)
    loads = {node: load for node, load in adapted.loads.items() if load is not None}
    loaded = agents.ask(loads, Loaded, timeout_s=_LOAD_TIMEOUT_S)
    coordinator = Coordinator(
        router,
        kv_capacity_tokens={node: answer.kv_capacity_tokens for node, answer in loaded.items()},
        max_concurrency=max_concurrency,
        paths=adapted.paths,
    )
    adaptation = Adaptation(adapted, router, now_s=time.perf_counter())
    can_replan = plan.cluster is not None and isinstance(router, Router) and options.replans
    replanned = served.adapted if can_replan else None
    return Engine(agents, coordinator, router.pipelines, timing, adaptation, replanned)


class _Served(NamedTuple):
    """What stays the same whatever plan is served."""

    agents: Agents
    files: Model
    timing: Timing
    options: AdaptOptions
    run: str

    def adapted(self, plan: Plan) -> Adapted:
        """How a plan is loaded and adapted.

        Raises:
            InputError: it does not say how it is served.
        """
        costs = {} if plan.cluster is None else {node.name: node.cost for node in plan.cluster.nodes}
        loads = {
            node: Load(
                model=str(self.files.directory),
                model_digest=self.files.digest(),
                dtype=plan.dtype,
                node=node,
                start=held.start,
                end=held.end,
                kv_capacity_tokens=_served(node, "kv_capacity_tokens", plan.nodes[node].kv_capacity_tokens),
                max_batch_tokens=_served(node, "max_batch_tokens", plan.nodes[node].max_batch_tokens),
                max_decode_batch=plan.max_decode_batch,
                peers={peer: self.agents.addresses[peer] for peer in sorted(plan.placement) if peer != node},
                latency_s=self.timing.held_s(node),
                bytes_per_s=_rates(plan, node, self.timing.time_scale),
                run=self.run,
                owner=_owner(),
                take_over=self.options.take_over,
                cost=None if (cost := costs.get(node)) is None else cost.stage,
                replay_memory_bytes=self.options.replay_memory_bytes,
            )
            for node, held in plan.placement.items()
        }
        return Adapted(
            run=self.run,
            plan=plan,
            loads=loads,
            paths=Paths(plan.placement, plan.num_layers, _connections(plan.cluster), _seconds(plan)),
            capacities=_capacities(plan),
            outage_s=self.options.outage_s,
            reflows=self.options.reflows,
        )


def _rates(plan: Plan, node: str, time_scale: float) -> dict[str, float]:
    """Peer -> bytes/s, by the wall clock, of the link from that node."""
    if plan.cluster is None:
        return {}
    links = {peer: plan.cluster.link(node, peer) for peer in plan.placement if peer != node}
    return {
        peer: link.bandwidth_bytes_per_s / time_scale
        for peer, link in links.items()
        if link is not None and link.bandwidth_bytes_per_s is not None
    }


def _owner() -> str:
    """This process, in words, for whoever else wants its agents."""
    return f"{getpass.getuser()}@{socket.gethostname()} (process {os.getpid()})"


def _connections(cluster: ClusterProfile | None) -> Callable[[str | None, str | None], bool]:
    """Whether the profile has a link from one node to another (``None``: the coordinator); all where it has none."""
    if cluster is None or cluster.default_link is not None:
        return lambda _src, _dst: True
    known = {(link.src, link.dst) for link in cluster.links}
    return lambda src, dst: (src or COORDINATOR, dst or COORDINATOR) in known


def _capacities(plan: Plan) -> Capacities | None:
    if plan.cluster is None:
        return None
    assumed = plan.assumptions
    return Capacities(
        plan.cluster, assumed.workload, concurrency=assumed.concurrency, partial=assumed.partial_inference
    )


def _seconds(plan: Plan) -> Seconds:
    """Predicted time of running tokens of one request through a hop again, by the nodes' measured costs."""
    if plan.cluster is None:
        return by_layers
    costs = {node.name: node.cost for node in plan.cluster.nodes}

    def seconds(hop: Hop, tokens: int) -> float:
        cost = costs[hop.node]
        assert cost is not None, "only profiles that were measured are kept in a plan"
        batch = BatchShape(tokens, 1, tokens * (tokens + 1) / 2, 0, 0, 0)
        return cost.stage.time_s(num_layers=hop.end - hop.start, batch=batch, first=hop.start == 0, last=False)

    return seconds


def _served(node: str, field: str, value: int | None) -> int:
    if value is None:
        raise InputError(
            f"plan: nodes.{node}.{field} is missing; only a plan of a cluster profiled by helixbench can be served"
        )
    return value
