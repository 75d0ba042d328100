"""Events in a simulation: what happens to its nodes and links, and the server's own adaptation to it.

Nodes report as agents do, and the adaptation is the server's: watch, reflow, recovery.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from helixbench.profiler.cluster import ClusterProfile
from helixbench.reference_server.coordinator.adaptation import Adaptation, Adapted, recorded
from helixbench.reference_server.coordinator.options import AdaptOptions
from helixbench.reference_server.run_log import AdaptationLog, Happened
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Plan
from helixbench.solver.scheduling.recover import Paths
from helixbench.solver.scheduling.requests import Moved
from helixbench.solver.scheduling.router import Chooser
from helixbench.solver.scheduling.watch import REPORT_EVERY_S, Cause, Report
from helixbench.solver.simulation.cluster import SimulatedCluster
from helixbench.solver.simulation.event_loop import FAULT
from helixbench.solver.simulation.events import (
    Event,
    LinkChanges,
    LinkCut,
    LinkEvent,
    LinkHeals,
    NodeDies,
    NodeDrains,
    NodeFreezes,
    NodeJoins,
    NodeResumes,
    NodeSlows,
    place_of,
    what_of,
)

TICK_S = 0.1
LINK_NOTICED_S = 3.0
"""A link that carries nothing is noticed so long after, as in a server (``watch.SILENT_AFTER_S``)."""


class SimulatedFaults:
    """Makes events happen in a simulated cluster, and adapts it as a server would.

    Args:
        plan: that is served.
        profile: of the cluster.
        router: whose weights are adapted.
        cluster: to act on.
        is_over: whether the run has ended, so that nothing more is to happen.
        remark: is told each change in one line.

    Attributes:
        is_down: the nodes that are left have not covered the model for longer than requests wait; the loop was stopped.
    """

    def __init__(
        self,
        plan: Plan,
        profile: ClusterProfile,
        router: Chooser,
        cluster: SimulatedCluster,
        *,
        is_over: Callable[[], bool],
        remark: Callable[[str], None],
    ) -> None:
        self._cluster, self._loop = cluster, cluster.loop
        self._is_over, self._remark = is_over, remark
        self._dead: set[str] = set()
        self._cut: set[tuple[str, str]] = set()
        options, assumed = AdaptOptions(), plan.assumptions
        adapted = Adapted(
            run="simulated",
            plan=plan,
            loads=dict.fromkeys(plan.placement),
            paths=Paths(plan.placement, plan.num_layers),
            capacities=Capacities(
                profile, assumed.workload, concurrency=assumed.concurrency, partial=assumed.partial_inference
            ),
            outage_s=options.outage_s,
            reflows=options.reflows,
        )
        self._adaptation = Adaptation(
            adapted, router, now_s=0.0, say=lambda line: remark(f"{self._loop.now_s:.1f} s: {line}")
        )
        self.is_down = False
        self._happened: list[Happened] = []

    def start(self, events: Sequence[Event]) -> None:
        """Schedule the events, and the reports of the nodes."""
        for event in events:
            self._loop.at(event.at_s, FAULT, self._happen, event)
        for name in self._cluster.nodes:
            self._loop.at(0.0, FAULT, self._report, name)
        self._loop.at(TICK_S, FAULT, self._tick)

    def moved(self, moved: Sequence[Moved]) -> None:
        """Requests lost their pipeline, or go on another one."""
        self._adaptation.moved(moved, now_s=self._loop.now_s)

    def log(self) -> AdaptationLog:
        """What happened, as a run's record has it."""
        log = recorded(self._adaptation.log, since_s=0.0, time_scale=1.0)
        return msgspec.structs.replace(log, events=tuple(self._happened))

    def _happen(self, event: Event) -> None:
        if self._is_over():
            return
        node, peer = place_of(event)
        now_s, cluster = self._loop.now_s, self._cluster
        factor = event.factor if isinstance(event, NodeSlows | LinkChanges) else None
        kind = str(event.__struct_config__.tag)
        if isinstance(event, NodeJoins) and node not in cluster.nodes:
            self._remark(f"{now_s:g} s: {node} joins; the plan does not use it")
            return
        self._remark(f"{now_s:g} s: {what_of(event)}")
        self._happened.append(Happened(at_s=now_s, kind=kind, node=node, peer=peer, factor=factor))
        if isinstance(event, NodeSlows):
            cluster.nodes[node].slowdown = event.factor
        elif isinstance(event, LinkEvent):
            self._change_link(event)
        elif isinstance(event, NodeFreezes):
            cluster.nodes[node].is_frozen = True
        elif isinstance(event, NodeResumes):
            self._go_on(node)
        elif isinstance(event, NodeDies):
            self._dead.add(node)
            cluster.nodes[node].is_frozen = True
            self._adaptation.gone(node, Cause.DISCONNECTED, now_s=now_s)
        elif isinstance(event, NodeDrains):
            self._adaptation.draining(node, now_s=now_s)
        elif isinstance(event, NodeJoins) and node in self._dead:
            self._dead.discard(node)
            self._go_on(node)
        self._adapt()

    def _go_on(self, node: str) -> None:
        """The node is there again; one that was given up has nothing of its past."""
        now_s = self._loop.now_s
        if node in self._adaptation.lost:
            self._adaptation.added(node, now_s=now_s)
        self._cluster.nodes[node].resume()
        self._report_once(node)

    def _change_link(self, event: LinkEvent) -> None:
        link = (event.src, event.dst)
        if isinstance(event, LinkChanges):
            self._cluster.links.scale(*link, event.factor)
            return
        if isinstance(event, LinkCut):
            self._cut.add(link)
            self._cluster.links.cut(*link)
        else:
            assert isinstance(event, LinkHeals)
            self._cut.discard(link)
            self._cluster.links.heal(*link)
        self._loop.at(self._loop.now_s + LINK_NOTICED_S, FAULT, self._notice_link, link)

    def _notice_link(self, link: tuple[str, str]) -> None:
        self._adaptation.link(link, is_up=link not in self._cut, now_s=self._loop.now_s)
        self._adapt()

    def _report(self, name: str) -> None:
        """A node's report, as an agent sends it; a frozen or dead one sends none."""
        if self._is_over():
            return
        if not self._cluster.nodes[name].is_frozen:
            self._report_once(name)
        self._loop.at(self._loop.now_s + REPORT_EVERY_S, FAULT, self._report, name)

    def _report_once(self, name: str) -> None:
        node = self._cluster.nodes[name]
        report = Report(
            due_in_s=REPORT_EVERY_S,
            iterations=node.iterations,
            measured_s=node.busy_s,
            predicted_s=node.predicted_s,
            has_work=not node.is_idle,
            progress_age_s=0.0,
            kv_used_tokens=0,
        )
        self._adaptation.reported(name, report, now_s=self._loop.now_s)

    def _tick(self, _: None) -> None:
        if self._is_over():
            return
        now_s = self._loop.now_s
        self._adaptation.tick(now_s)
        for node in self._adaptation.draining_nodes:
            if not self._cluster.coordinator.kv_held_tokens.get(node):
                self._adaptation.drained(node, now_s=now_s)
        self._adapt()
        is_covered = self._cluster.coordinator.is_covered
        if self._adaptation.outage_s(now_s, is_covered=is_covered) > self._adaptation.longest_outage_s:
            self.is_down = True
            self._loop.stop()
        self._loop.at(now_s + TICK_S, FAULT, self._tick)

    def _adapt(self) -> None:
        adaptation = self._adaptation
        adaptation.reflow(self._loop.now_s)
        if adaptation.take_changed():
            self._cluster.observe(
                lost=adaptation.lost,
                passed_over=adaptation.passed_over - adaptation.lost,
                links_down=adaptation.watch.links_down,
            )
