"""A plan served on a virtual clock: the serving rules of ``solver.scheduling``, times of the profile, no hardware.

The same configuration and seed give the same run, byte for byte: nothing here reads a clock or depends on hashes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from helixbench.errors import InputError, MeasurementError
from helixbench.profiler.cluster import COORDINATOR, ClusterProfile
from helixbench.records import Provenance, digest
from helixbench.reference_server.coordinator.effects import with_effects, with_predictions
from helixbench.reference_server.run_log import AdaptationLog, RunLog, Window
from helixbench.reference_server.simulation.compatibility import notes_on_fit, require_fit
from helixbench.reference_server.simulation.config import SimulationConfig
from helixbench.reference_server.simulation.faults import SimulatedFaults
from helixbench.reference_server.simulation.load import Load
from helixbench.reference_server.simulation.run_record import KvUse, Snapshot, link_uses, node_uses, snapshot
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Plan
from helixbench.solver.problem.tables import TABLE_NOTE
from helixbench.solver.scheduling.recover import Paths
from helixbench.solver.scheduling.requests import InFlight, Moved, Request
from helixbench.solver.scheduling.routings import SwarmRouter, make_router
from helixbench.solver.simulation.cluster import NodeSetup, SimulatedCluster
from helixbench.solver.simulation.event_loop import ARRIVAL, FAULT, MARK
from helixbench.solver.simulation.events import Event, name_of
from helixbench.solver.simulation.node import SimulatedNode

_EVENTS_A_TURN = 20_000  # between two looks at whether to go on


class SimulationResult(msgspec.Struct, frozen=True):
    """The run record, remarks for people, and the requests at the end of the window."""

    run: RunLog
    num_events: int
    remarks: tuple[str, ...]
    num_waiting: int
    num_in_flight: int


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
        on_progress: called with (done, total), in seconds or requests.
        is_interrupted: polled; when true the window ends and what was simulated is kept.

    Raises:
        InputError: plan, profile and load do not belong together.
        MeasurementError: nothing was measured.
    """
    return _Simulation(plan, profile, config).run(on_progress, is_interrupted)


class _Simulation:
    def __init__(self, plan: Plan, profile: ClusterProfile, config: SimulationConfig) -> None:
        require_fit(plan, profile, config)
        self._plan, self._profile, self._config = plan, profile, config
        self._requests = Load(
            config.arrivals,
            config.workload,
            trace=config.trace,
            concurrency=config.concurrency or 0,
            limit=None if config.is_closed_loop else config.num_requests,
            seed=config.seed,
        )
        self._remarks = notes_on_fit(plan, profile)
        self._to_come = list(config.events)
        self._capacities = Capacities(profile, config.workload)
        links = self._capacities.links

        def is_connected(src: str | None, dst: str | None) -> bool:
            return links.bandwidth(src or COORDINATOR, dst or COORDINATOR) is not None

        self._router = make_router(plan, config.routing, seed=config.seed, is_connected=is_connected)
        kv_tokens = {name: self._kv_tokens(name) for name in sorted(plan.placement)}
        self._kv_use = KvUse(kv_tokens, self._router.pipelines)
        self._cluster = SimulatedCluster(
            profile,
            {name: self._setup(name, kv_tokens[name]) for name in kv_tokens},
            self._router,
            self,
            max_decode_batch=plan.max_decode_batch,
            max_concurrency=None if config.is_closed_loop else config.concurrency,
            seed=config.seed,
            on_iteration=self._iterated,
            on_answer=self._check_window,
            on_moved=self._moved,
            paths=Paths(plan.placement, plan.num_layers, is_connected) if config.events else None,
        )
        self._faults = self._make_faults() if config.events else None
        self._require_servable()
        self._loop = self._cluster.loop
        self._begin: Snapshot | None = None
        self._begin_s = 0.0
        self._finished_before = 0
        self._end_s: float | None = None

    def run(self, on_progress: Callable[[float, float], None], is_interrupted: Callable[[], bool]) -> SimulationResult:
        config, loop = self._config, self._loop
        for event in config.events:
            loop.at(event.at_s, FAULT, self._note, event)
        if self._faults is not None:
            self._faults.start(config.events)
        if not config.is_closed_loop:
            loop.at(config.warmup_s, MARK, self._begin_window)
        elif config.warmup_s > 0:
            loop.at(config.warmup_s, MARK, lambda _: self._check_window())
        # As what arrives at 0: after the marks and the events of that moment.
        loop.at(0.0, ARRIVAL, self._cluster.start)
        self._schedule_arrival()
        interrupted = False
        while loop.run(_EVENTS_A_TURN) and not interrupted:
            interrupted = is_interrupted()
            on_progress(*self._progress())
        return self._finish("interrupted" if interrupted else self._why_down())

    def _finish(self, cut_short: str) -> SimulationResult:
        if self._end_s is None:
            in_flight = self._cluster.coordinator.num_in_flight
            assert cut_short or not in_flight, f"nothing happens any more with {in_flight} in flight"
            self._end_window(None)
        nothing = self._why_nothing()
        result = None if nothing else self._result(cut_short)
        if result is None:
            raise MeasurementError(f"nothing was measured: {cut_short or nothing}")
        return result

    def _why_down(self) -> str:
        is_down = self._faults is not None and self._faults.is_down
        return "the nodes that are left do not cover the model" if is_down else ""

    def _why_nothing(self) -> str:
        """Why there is nothing to report; empty where there is something."""
        now_s = self._loop.now_s
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
            self._remarks.append(f"the run had ended at {self._loop.now_s:.6g} s, before these events: {named}")
        held, num_events = self._cluster.coordinator, self._loop.num_events
        remarks = tuple(self._remarks)
        return SimulationResult(self._record(cut_short), num_events, remarks, held.num_waiting, held.num_in_flight)

    # --- the nodes

    def _kv_tokens(self, name: str) -> int:
        planned = self._plan.nodes[name].kv_capacity_tokens
        return self._capacities.kv_tokens(name, self._plan.placement[name]) if planned is None else planned

    def _setup(self, name: str, kv_tokens: int) -> NodeSetup:
        held, node = self._plan.placement[name], self._profile.node(name)
        if node.cost is None and TABLE_NOTE not in self._remarks:
            self._remarks.append(TABLE_NOTE)
        return NodeSetup(
            held,
            self._capacities.stage_cost(name, held),
            max_batch_tokens=self._plan.nodes[name].max_batch_tokens or self._capacities.max_batch_tokens(name, held),
            kv_slots=self._capacities.kv_slots(name, held, kv_tokens=kv_tokens, share=self._config.kv_share),
        )

    def _is_limited(self) -> bool:
        """Whether fewer requests arrive, or others are admitted, than an offline plan takes."""
        config, share = self._config, self._config.kv_share
        is_other_share = share is not None and any(
            self._capacities.admission_share(name) != share for name in self._plan.placement
        )
        return not config.is_closed_loop and (bool(config.concurrency or config.num_requests) or is_other_share)

    def _require_servable(self) -> None:
        largest = self._cluster.coordinator.largest_request_tokens()
        longest = self._config.workload.max_kv_tokens - 1
        if longest > largest:
            raise InputError(
                f"the workload's longest request needs {longest} KV slots; the plan's pipelines hold {largest} at "
                "most: use shorter requests, or solve for this workload"
            )

    # --- the load, and what is recorded of it

    def following(self, num_waiting: int, now_s: float) -> Sequence[Request]:
        return self._requests.following(num_waiting, now_s)

    def admitted(self, requests: Sequence[InFlight], now_s: float) -> None:
        self._requests.admitted(requests, now_s)
        self._kv_use.open(requests)

    def answered(self, num_tokens: int, began: Sequence[InFlight], ended: Sequence[InFlight], now_s: float) -> None:
        self._requests.answered(num_tokens, began, ended, now_s)
        self._kv_use.close(ended)

    def _iterated(self, node: SimulatedNode, prefill_tokens: int, decode_tokens: int, seconds: float) -> None:
        end_s = self._loop.now_s
        self._kv_use.iteration(node, decode_tokens=decode_tokens, begin_s=end_s - seconds, end_s=end_s)
        if isinstance(self._router, SwarmRouter) and seconds > 0:  # no time says nothing of the speed
            self._router.observed(node.name, (prefill_tokens + decode_tokens) / seconds)

    def _make_faults(self) -> SimulatedFaults:
        return SimulatedFaults(
            self._plan,
            self._profile,
            self._router,
            self._cluster,
            is_over=lambda: self._end_s is not None,
            remark=self._remarks.append,
        )

    def _moved(self, moved: Sequence[Moved]) -> None:
        assert self._faults is not None, "nothing is lost where nothing happens"
        self._faults.moved(moved)
        self._kv_use.set(self._cluster.coordinator.kv_held_tokens, self._cluster.ending)

    # --- arrivals and events

    def _schedule_arrival(self, _: None = None) -> None:
        coming = self._requests.next_arrival()
        if coming is not None:
            at_s, request = coming
            self._loop.at(at_s, ARRIVAL, self._arrive, request)

    def _arrive(self, request: Request) -> None:
        self._cluster.arrive(request)
        self._schedule_arrival()

    def _note(self, event: Event) -> None:
        """Of what did happen, for the remarks on what did not."""
        if self._end_s is None:
            self._to_come.remove(event)

    # --- the window that counts

    def _check_window(self) -> None:
        """In a closed loop the window begins and ends with requests; else it ends with the last one that arrives."""
        config, load, now_s = self._config, self._requests, self._loop.now_s
        if not config.is_closed_loop:
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
        """Nothing more can arrive: idle time after the work is not measured."""
        duration_s = self._config.duration_s
        if duration_s is not None and self._begin is not None:
            seconds = self._loop.now_s - self._begin_s
            self._remarks.append(f"the window ends after {seconds:.6g} of {duration_s:g} s: all requests had ended")
        self._end_window(None)

    def _begin_window(self, _: None) -> None:
        if self._end_s is not None:
            return  # all had ended before
        self._begin = self._read()
        self._finished_before = len(self._requests.finished)
        # What happened until now is before the window, what else happens now is in it only at its very beginning.
        now_s = self._loop.now_s
        self._begin_s = math.nextafter(now_s, math.inf) if self._config.is_closed_loop else now_s
        if self._config.duration_s is not None:
            self._loop.at(self._begin_s + self._config.duration_s, MARK, self._end_window)

    def _end_window(self, marked: None) -> None:
        del marked
        if self._end_s is not None:
            return  # all had ended before
        self._end = self._read()
        now_s = self._loop.now_s
        is_marked = self._config.duration_s is not None and now_s == self._begin_s + self._config.duration_s
        self._end_s = now_s if is_marked else math.nextafter(now_s, math.inf)
        self._loop.stop()

    def _read(self) -> Snapshot:
        requests = self._requests
        return snapshot(
            self._cluster,
            self._kv_use,
            prompt_tokens=requests.prompt_tokens,
            output_tokens=requests.output_tokens,
        )

    def _progress(self) -> tuple[float, float]:
        config = self._config
        if config.num_requests is not None and config.duration_s is None:
            before = config.concurrency or 0 if config.is_closed_loop else 0
            return len(self._requests.finished), before + config.num_requests
        return self._loop.now_s, config.warmup_s + (config.duration_s or 0.0)

    def _adaptation_log(self) -> AdaptationLog:
        if self._faults is None:
            return AdaptationLog()
        assert self._end_s is not None
        load = self._requests
        log = with_effects(self._faults.log(), load.counts, load.finished, self._end_s)
        return with_predictions(log, self._plan, self._profile, self._config.concurrency)

    def _record(self, cut_short: str) -> RunLog:
        config, load, plan, profile = self._config, self._requests, self._plan, self._profile
        assert self._begin is not None
        assert self._end_s is not None
        used = {node.name: node for node in profile.nodes if node.name in plan.placement}
        return RunLog(
            plan=plan,
            workload=config.workload,
            concurrency=(config.is_closed_loop and config.concurrency) or max(1, load.peak_in_flight),
            routing=config.routing,
            seed=config.seed,
            window=Window(self._begin_s, self._end_s),
            prompt_tokens=self._end.prompt_tokens - self._begin.prompt_tokens,
            output_tokens=self._end.output_tokens - self._begin.output_tokens,
            requests=tuple(load.finished),
            pipelines=tuple(tuple((hop.node, hop.start, hop.end) for hop in p) for p in self._router.pipelines),
            nodes=node_uses(self._begin, self._end),
            links=link_uses(self._begin, self._end, self._cluster),
            timeline=load.timeline(self._end_s),
            node_timeline=self._kv_use.series(self._loop.now_s),
            device_names={name: node.device.label for name, node in used.items()},
            regions={name: node.region for name, node in used.items() if node.region},
            testbed=_description(config, self._remarks),
            arrivals=str(config.arrivals),
            is_limited=self._is_limited(),
            simulated=True,
            cut_short=cut_short,
            limits=config.limits,
            adaptation=self._adaptation_log(),
            provenance=Provenance(
                inputs={"plan": digest(plan), "cluster": digest(profile)},
                source="helixbench simulate: no clock of this machine is in this record",
            ),
        )


def _description(config: SimulationConfig, remarks: list[str]) -> str:
    share = "" if config.kv_share is None else f", admission fills {config.kv_share:.0%} of the KV caches"
    return "; ".join([f"simulated: {config.arrivals}{share}", *remarks])
