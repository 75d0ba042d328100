"""A plan served on a virtual clock: the server's router, coordinator, batcher and gather rule, and no hardware.

The same configuration and seed give the same run, byte for byte: nothing here reads a clock or depends on hashes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec

from helixbench.errors import InputError, MeasurementError
from helixbench.profiler.cluster import COORDINATOR, ClusterProfile
from helixbench.records import Provenance, digest
from helixbench.reference_server.run_log import RunLog, Window
from helixbench.reference_server.simulation.arrivals import Arrivals, TracedRequest
from helixbench.reference_server.simulation.checks import ConservationError, Ledger, require_nothing_left
from helixbench.reference_server.simulation.compatibility import notes_on_fit, require_fit
from helixbench.reference_server.simulation.counters import (
    LinkCount,
    Snapshot,
    link_uses,
    node_points,
    node_uses,
    snapshot,
)
from helixbench.reference_server.simulation.front import Front
from helixbench.reference_server.simulation.load import Load
from helixbench.reference_server.simulation.node import SimulatedNode
from helixbench.solver.problem.capacity import TABLE_KV_SHARE, Capacities
from helixbench.solver.problem.plan import Plan
from helixbench.solver.problem.workload import Workload
from helixbench.solver.scheduling.batcher import Batcher
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.hop_routers import SwarmRouter
from helixbench.solver.scheduling.routings import make_router
from helixbench.solver.scheduling.work import Routing
from helixbench.solver.simulation.event_loop import ARRIVAL, FAULT, MARK, Kernel
from helixbench.solver.simulation.events import Event, LinkChanges, NodeJoins, NodeSlows, name_of
from helixbench.solver.simulation.links import Wires
from helixbench.solver.simulation.stage_time import TABLE_NOTE, StageTimer, timing_of

_EVENTS_A_TURN = 20_000  # between two looks at whether to go on


class SimulationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to simulate.

    ``concurrency`` is the number of requests of a closed loop, and the most that are let in of other arrivals. The
    window begins at ``warmup_s``, in a closed loop not before as many requests have ended as are in flight. It lasts
    ``duration_s``, or ends when ``num_requests`` have: in a closed loop so many inside the window, else all that come;
    and before that where nothing more can come and all requests have ended.
    ``kv_share`` is how much of each KV cache admission fills; ``None`` for all of it, and for what ``solver.expected``
    takes (80 %) where a node has only a capacity table, since what the table means rests on that.
    """

    workload: Workload
    arrivals: Arrivals
    trace: tuple[TracedRequest, ...] = ()
    routing: Routing = "iwrr"
    seed: int = 0
    concurrency: int | None = None
    num_requests: int | None = None
    duration_s: float | None = 600.0
    warmup_s: float = 60.0
    kv_share: float | None = None
    events: tuple[Event, ...] = ()


class SimulationResult(msgspec.Struct, frozen=True):
    """The run record, and what happened beside it: ``remarks`` for people, requests at the end of the window."""

    run: RunLog
    num_events: int
    remarks: tuple[str, ...]
    num_waiting: int
    num_in_flight: int


class NodeDiedError(MeasurementError):
    """A node died, and the coordinator does not go on without it. ``result`` is what was simulated until then."""

    def __init__(self, message: str, result: SimulationResult | None) -> None:
        super().__init__(message)
        self.result = result


def simulate(
    plan: Plan,
    profile: ClusterProfile,
    config: SimulationConfig,
    *,
    on_progress: Callable[[float, float], None] = lambda _done, _total: None,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> SimulationResult:
    """Serve the plan on a virtual clock.

    Args:
        plan: what is served.
        profile: nodes and links; usually the cluster that the plan was made for.
        config: the load and how long.
        on_progress: told (done, total), in seconds or requests.
        is_interrupted: asked now and then; when true the window ends and what was simulated is kept.

    Raises:
        InputError: plan, profile and load do not belong together.
        MeasurementError: nothing was measured; ``NodeDiedError`` where a node died.
    """
    return _Simulation(plan, profile, config).run(on_progress, is_interrupted)


class _Simulation:
    def __init__(self, plan: Plan, profile: ClusterProfile, config: SimulationConfig) -> None:
        require_fit(plan, profile, config)
        self._plan, self._profile, self._config = plan, profile, config
        self._is_closed = config.arrivals.kind == "closed loop"
        self._kernel = Kernel()
        self._wires = Wires(profile, self._kernel)
        self._ledger = Ledger()
        self._load = Load(
            config.arrivals,
            config.workload,
            trace=config.trace,
            limit=None if self._is_closed else config.num_requests,
            seed=config.seed,
        )
        self._remarks = notes_on_fit(plan, profile)
        self._to_come = list(config.events)
        self._router = make_router(
            plan,
            config.routing,
            seed=config.seed,
            is_connected=lambda src, dst: self._wires.is_connected(src or COORDINATOR, dst or COORDINATOR),
        )
        self._links: dict[tuple[str, str], LinkCount] = {}  # (from, to) -> what crossed it
        capacities = Capacities(profile, config.workload)
        self._nodes = {name: self._make_node(name, capacities) for name in sorted(plan.placement)}
        admitted = {name: int(node.kv_capacity_tokens * self._kv_share(name)) for name, node in self._nodes.items()}
        coordinator = Coordinator(
            self._router,
            kv_capacity_tokens=admitted,
            max_concurrency=None if self._is_closed else config.concurrency,
        )
        self._require_servable(coordinator)
        self._front = Front(
            coordinator,
            profile.coordinator,
            self._kernel,
            load=self._load,
            ledger=self._ledger,
            send=self._send,
            on_answer=self._check_window,
        )
        self._begin: Snapshot | None = None
        self._begin_s = 0.0
        self._finished_before = 0
        self._end_s: float | None = None
        self._died = ""

    def run(self, on_progress: Callable[[float, float], None], is_interrupted: Callable[[], bool]) -> SimulationResult:
        config, kernel = self._config, self._kernel
        for event in config.events:
            kernel.at(event.at_s, FAULT, self._happen, event)
        if not self._is_closed:
            kernel.at(config.warmup_s, MARK, self._begin_window)
        elif config.warmup_s > 0:
            kernel.at(config.warmup_s, MARK, lambda _: self._check_window())
        # As what arrives at 0: after the marks and the events of that moment.
        kernel.at(0.0, ARRIVAL, self._front.start, config.concurrency or 0 if self._is_closed else 0)
        self._schedule_arrival()
        interrupted = False
        while kernel.run(_EVENTS_A_TURN) and not interrupted:
            interrupted = is_interrupted()
            on_progress(*self._progress())
        return self._finish("interrupted" if interrupted else self._died)

    def _finish(self, cut_short: str) -> SimulationResult:
        coordinator = self._front.coordinator
        if self._end_s is None:
            if not cut_short and (coordinator.num_in_flight or coordinator.num_waiting):
                raise ConservationError(f"nothing happens any more with {coordinator.num_in_flight} in flight")
            self._end_window(None)
        self._ledger.close(
            self._nodes.values(), num_waiting=coordinator.num_waiting, num_in_flight=coordinator.num_in_flight
        )
        nothing = self._why_nothing()
        result = None if nothing else self._result(cut_short)
        if self._load.is_over:
            while self._kernel.run(_EVENTS_A_TURN):
                pass  # what is on its way yet: nodes are told of the last requests that they have ended
            require_nothing_left(self._nodes.values(), coordinator)
        if self._died:
            raise NodeDiedError(self._died, result)
        if result is None:
            raise MeasurementError(f"nothing was measured: {cut_short or nothing}")
        return result

    def _why_nothing(self) -> str:
        """Why there is nothing to tell; empty where there is."""
        now_s = self._kernel.now_s
        if self._begin is None or now_s <= self._begin_s:
            return f"all ended by {now_s:.3g} s, before the window begins: give --warmup-s less"
        if self._end.output_tokens == self._begin.output_tokens:
            return (
                f"no token came out in the window, {self._begin_s:.3g} s to {self._end_s:.3g} s: "
                "give --duration-s more, or --warmup-s less"
            )
        return ""

    def _result(self, cut_short: str) -> SimulationResult:
        if self._to_come:
            named = ", ".join(name_of(event) for event in self._to_come)
            self._remarks.append(f"the run had ended at {self._kernel.now_s:.6g} s, before these events: {named}")
        held, num_events = self._front.coordinator, self._kernel.num_events
        remarks = tuple(self._remarks)
        return SimulationResult(self._record(cut_short), num_events, remarks, held.num_waiting, held.num_in_flight)

    # --- what the cluster is made of

    def _make_node(self, name: str, capacities: Capacities) -> SimulatedNode:
        plan, router = self._plan, self._router
        held, flow = plan.placement[name], plan.nodes[name]
        node = self._profile.node(name)
        timing = timing_of(capacities, node, held)
        if node.cost is None and TABLE_NOTE not in self._remarks:
            self._remarks.append(TABLE_NOTE)
        kv_tokens = flow.kv_capacity_tokens
        on_iteration = None
        if isinstance(router, SwarmRouter):
            swarm = router

            def on_iteration(node: str, tokens: int, seconds: float) -> None:
                if seconds > 0:  # no time tells of no speed
                    swarm.observed(node, tokens / seconds)

        return SimulatedNode(
            name,
            self._kernel,
            is_last=held.end == plan.num_layers,
            timer=StageTimer(timing.cost, held, num_layers=plan.num_layers, seed=f"{self._config.seed} {name}"),
            batcher=Batcher(
                max_batch_tokens=flow.max_batch_tokens or timing.max_batch_tokens,
                max_decode_batch=plan.max_decode_batch,
            ),
            kv_capacity_tokens=capacities.kv_tokens(name, held) if kv_tokens is None else kv_tokens,
            send=self._send,
            on_iteration=on_iteration,
        )

    def _kv_share(self, name: str) -> float:
        return self._planned_kv_share(name) if self._config.kv_share is None else self._config.kv_share

    def _planned_kv_share(self, name: str) -> float:
        return 1.0 if self._profile.node(name).cost is not None else TABLE_KV_SHARE

    def _is_limited(self) -> bool:
        """Whether fewer requests come, or others are let in, than an offline plan takes."""
        config = self._config
        is_other_share = any(self._kv_share(name) != self._planned_kv_share(name) for name in self._nodes)
        return not self._is_closed and (bool(config.concurrency or config.num_requests) or is_other_share)

    def _send(self, src: str, dst: str, tokens: int, message: Any) -> None:
        ends = (src, dst)
        count = self._links.get(ends)
        if count is None:
            deliver = self._front.receive if dst == COORDINATOR else self._nodes[dst].receive
            count = self._links[ends] = LinkCount(self._profile.bytes_per_token(src, dst), deliver)
        count.messages += 1
        count.tokens += tokens
        self._wires.send(src, dst, tokens * count.bytes_per_token, count.deliver, message)

    def _require_servable(self, coordinator: Coordinator) -> None:
        largest = coordinator.largest_request_tokens()
        longest = self._config.workload.max_kv_tokens - 1
        if longest > largest:
            raise InputError(
                f"the workload's longest request needs {longest} KV slots; the plan's pipelines hold {largest} at "
                "most: use shorter requests, or solve for this workload"
            )

    # --- what comes from outside

    def _schedule_arrival(self, _: None = None) -> None:
        coming = self._load.next_arrival()
        if coming is not None:
            at_s, request = coming
            self._kernel.at(at_s, ARRIVAL, self._arrive, request)

    def _arrive(self, request: Any) -> None:
        self._front.receive(request)
        self._schedule_arrival()

    def _happen(self, event: Event) -> None:
        if self._end_s is not None:
            return
        self._to_come.remove(event)
        at = f"{event.at_s:g} s"
        if isinstance(event, NodeSlows):
            self._nodes[event.node].slowdown = event.factor
            self._remarks.append(f"{at}: iterations of {event.node} take {event.factor:g} times as long")
        elif isinstance(event, LinkChanges):
            self._wires.scale(event.src, event.dst, event.factor)
            self._remarks.append(f"{at}: {event.src} -> {event.dst} carries {event.factor:g} of its bandwidth")
        elif isinstance(event, NodeJoins):
            self._remarks.append(f"{at}: {event.node} joins; the coordinator keeps to its plan and does not use it")
        else:
            self._died = f"node {event.node} died at {at}; the coordinator does not go on without it"
            self._kernel.stop()

    # --- the window that counts

    def _check_window(self) -> None:
        """In a closed loop the window begins and ends with requests; else it ends with the last one that comes."""
        config, load, now_s = self._config, self._load, self._kernel.now_s
        if not self._is_closed:
            if load.is_over:
                self._end_early()
            return
        assert config.concurrency is not None
        if self._begin is None:
            if len(load.finished) >= config.concurrency and now_s >= config.warmup_s:
                self._begin_window(None)
        elif config.num_requests is not None and len(load.finished) - self._finished_before >= config.num_requests:
            self._end_window(None)

    def _end_early(self) -> None:
        """Nothing more can come: idle time after the work is no part of what is measured."""
        duration_s = self._config.duration_s
        if duration_s is not None and self._begin is not None:
            seconds = self._kernel.now_s - self._begin_s
            self._remarks.append(f"the window ends after {seconds:.6g} of {duration_s:g} s: all requests had ended")
        self._end_window(None)

    def _begin_window(self, _: None) -> None:
        if self._end_s is not None:
            return  # all had ended before
        self._begin = self._read()
        self._finished_before = len(self._load.finished)
        # What happened until now is before the window, what else happens now is in it only at its very beginning.
        now_s = self._kernel.now_s
        self._begin_s = math.nextafter(now_s, math.inf) if self._is_closed else now_s
        if self._config.duration_s is not None:
            self._kernel.at(self._begin_s + self._config.duration_s, MARK, self._end_window)

    def _end_window(self, marked: None) -> None:
        del marked
        if self._end_s is not None:
            return  # all had ended before
        self._end = self._read()
        now_s = self._kernel.now_s
        is_marked = self._config.duration_s is not None and now_s == self._begin_s + self._config.duration_s
        self._end_s = now_s if is_marked else math.nextafter(now_s, math.inf)
        self._kernel.stop()

    def _read(self) -> Snapshot:
        load = self._load
        return snapshot(
            self._nodes.values(), self._links, prompt_tokens=load.prompt_tokens, output_tokens=load.output_tokens
        )

    def _progress(self) -> tuple[float, float]:
        config = self._config
        if config.num_requests is not None and config.duration_s is None:
            return len(self._load.finished), config.num_requests + (config.concurrency or 0 if self._is_closed else 0)
        return self._kernel.now_s, config.warmup_s + (config.duration_s or 0.0)

    def _record(self, cut_short: str) -> RunLog:
        config, load, plan, profile = self._config, self._load, self._plan, self._profile
        assert self._begin is not None
        assert self._end_s is not None
        used = {node.name: node for node in profile.nodes if node.name in plan.placement}
        return RunLog(
            plan=plan,
            workload=config.workload,
            concurrency=config.concurrency if self._is_closed and config.concurrency else max(1, load.peak_in_flight),
            routing=config.routing,
            seed=config.seed,
            window=Window(self._begin_s, self._end_s),
            prompt_tokens=self._end.prompt_tokens - self._begin.prompt_tokens,
            output_tokens=self._end.output_tokens - self._begin.output_tokens,
            requests=tuple(load.finished),
            pipelines=tuple(tuple((hop.node, hop.start, hop.end) for hop in p) for p in self._router.pipelines),
            nodes=node_uses(self._begin, self._end),
            links=link_uses(self._begin, self._end, self._links),
            timeline=load.timeline(self._end_s),
            node_timeline={n: node_points(node.history, now_s=self._kernel.now_s) for n, node in self._nodes.items()},
            device_names={name: node.device.name for name, node in used.items()},
            regions={name: node.region for name, node in used.items() if node.region},
            testbed=_description(config, self._remarks),
            arrivals=str(config.arrivals),
            is_limited=self._is_limited(),
            simulated=True,
            cut_short=cut_short,
            provenance=Provenance(
                inputs={"plan": digest(plan), "cluster": digest(profile)},
                source="helixbench simulate: no clock of this machine is in this record",
            ),
        )


def _description(config: SimulationConfig, remarks: list[str]) -> str:
    share = "" if config.kv_share is None else f", admission fills {config.kv_share:.0%} of the KV caches"
    return "; ".join([f"simulated: {config.arrivals}{share}", *remarks])
