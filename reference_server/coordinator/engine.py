"""Engine: the coordinator run for real. Its decisions go out over the wire, tokens that come in go to it."""

from __future__ import annotations

import array
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from helixbench.errors import MeasurementError
from helixbench.profiler.cluster import COORDINATOR
from helixbench.reference_server.coordinator.adaptation import TICK_S, Adaptation, Adapted
from helixbench.reference_server.coordinator.replan import Replanner
from helixbench.reference_server.testbed.emulation import Timing
from helixbench.reference_server.wire.client import Agents, Disconnected, Unreadable
from helixbench.reference_server.wire.held import due_s
from helixbench.reference_server.wire.messages import (
    Answer,
    CannotReplay,
    Counters,
    Done,
    Failed,
    LinkCounters,
    Loaded,
    ReadCounters,
    Release,
    Renew,
    RequestsFailed,
    Sampled,
    SetSpeed,
    Status,
    Work,
)
from helixbench.reference_server.wire.seldom import Seldom
from helixbench.solver.problem.plan import Infeasible, Pipeline, Plan
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.requests import Actions, Request, TokenEvent
from helixbench.solver.scheduling.watch import Cause

_log = logging.getLogger(__name__)
_LOAD_TIMEOUT_S = 300.0

REPLAN_AFTER_S = 3.0
"""Layers are moved only where the nodes that are left have not covered the model for so long: a node may come back."""

OnEvents: TypeAlias = Callable[[list[TokenEvent]], list[Request]]


class Engine:
    """Serves a plan on loaded agents. Not thread-safe: one thread calls it.

    Args:
        agents: connections to them.
        coordinator: decides about requests.
        pipelines: the router's.
        timing: of the testbed.
        adaptation: what to do about nodes that change; ``None`` where nothing ever does.
        replanned: how another plan is loaded and adapted; ``None`` where layers stay where they are.

    Attributes:
        is_emulated: whether some node keeps the times of an emulated device.
        is_covered: whether the nodes that take requests cover the model.
    """

    def __init__(
        self,
        agents: Agents,
        coordinator: Coordinator,
        pipelines: Sequence[Pipeline],
        timing: Timing = Timing(),  # noqa: B008 - frozen
        adaptation: Adaptation | None = None,
        replanned: Callable[[Plan], Adapted] | None = None,
    ) -> None:
        self.agents = agents
        self.timing = timing
        self.adaptation = adaptation
        self._replanned = replanned
        self._replanner = Replanner()
        self.is_emulated = False
        self.is_covered = True
        self._late: dict[str, int] = {}  # node -> its late iterations, when last asked
        self._latency_s = timing.held_s(COORDINATOR)  # node -> seconds that messages there are held
        self.coordinator = coordinator
        self.pipelines = pipelines
        self.sent: dict[str, LinkCounters] = {}  # node -> what went there
        self._seldom = Seldom(_log)
        self._asked: set[str] = set()  # nodes whose counters are wanted
        self._counters: dict[str, Counters] = {}  # node -> its answer to the question under way

    def release(self) -> None:
        """The run is over: agents are free for another one."""
        self._replanner.close()
        if self.adaptation is not None:
            for node in self.agents.addresses:
                self.agents.send(node, Release(self.adaptation.run))

    def set_speed(self, node: str, factor: float) -> None:
        """The node's emulated device takes this many times as long from now on."""
        self.agents.send(node, SetSpeed(factor))

    def drain(self, node: str) -> None:
        """The node takes no new requests from now on; once it has none left it is drained."""
        assert self.adaptation is not None, "a plan that is not adapted cannot do without a node"
        self.adaptation.draining(node, now_s=time.perf_counter())

    def submit(self, requests: Iterable[Request]) -> list[TokenEvent]:
        """New requests; see ``Coordinator.submit``."""
        return self._do(self.coordinator.submit(requests))

    def abort(self, number: int) -> list[TokenEvent]:
        """A client has gone; see ``Coordinator.abort``."""
        return self._do(self.coordinator.abort(number))

    def step(self, timeout_ms: int, *, on_events: OnEvents = lambda _events: []) -> None:
        """Take what agents sent and answer it.

        Args:
            timeout_ms: wait at most this long for something to come.
            on_events: told what each message does to requests; the requests that it returns arrive in that moment, so
                they travel in the same messages as what the message set off (closed loop).

        Without an adaptation, what goes wrong with an agent raises.

        Raises:
            MeasurementError: an agent died, failed, or sent what is no answer.
        """
        if self.adaptation is not None:
            timeout_ms = min(timeout_ms, round(1000 * TICK_S))
        for node, answer in self.agents.receive(timeout_ms):
            if isinstance(answer, Sampled):
                self._sampled(node, answer, on_events)
            elif isinstance(answer, Counters):
                self._counters[node] = answer
                self._late[node] = answer.late_iterations
            elif isinstance(answer, CannotReplay):
                self._tell(self.coordinator.cannot_replay(answer.attempt, node), on_events)
            elif isinstance(answer, RequestsFailed):
                self._seldom.say(logging.WARNING, f"{node} {answer.message}", f"node {node}: {answer.message}")
                self._tell(self.coordinator.failed(answer.attempts, answer.message), on_events)
            else:
                self._node_says(node, answer)
        if self.adaptation is not None:
            self._adapt(self.adaptation, on_events)

    def _node_says(self, node: str, answer: Answer | Disconnected | Unreadable) -> None:
        """What is not about requests: about the node itself."""
        adaptation, now_s = self.adaptation, time.perf_counter()
        if isinstance(answer, Done | Loaded):
            return
        if adaptation is None:
            what = (
                answer.message if isinstance(answer, Failed | Unreadable) else f"{type(answer).__name__}, not asked for"
            )
            raise MeasurementError(f"node {node}: {what}; see the agent's log")
        if isinstance(answer, Status):
            command = adaptation.heard(node, answer, now_s=now_s)
            if command is not None:
                self.agents.send(node, command)
        elif isinstance(answer, Disconnected):
            adaptation.gone(node, Cause.DISCONNECTED, now_s=now_s)
        elif isinstance(answer, Failed):
            adaptation.gone(node, Cause.FAILED, now_s=now_s, detail=answer.message)
        else:
            self._seldom.say(logging.WARNING, f"{node} {type(answer).__name__}", f"node {node}: {answer}")

    def _adapt(self, adaptation: Adaptation, on_events: OnEvents) -> None:
        now_s = time.perf_counter()
        if adaptation.tick(now_s):
            for node in self.agents.addresses:
                self.agents.send(node, Renew(adaptation.run))
        adaptation.reflow(now_s)
        if adaptation.take_changed():
            actions = self.coordinator.observe(
                lost=adaptation.lost,
                passed_over=adaptation.passed_over - adaptation.lost,
                links_down=adaptation.watch.links_down,
            )
            self.is_covered = self.coordinator.is_covered
            self._tell(actions, on_events)
        for node in adaptation.draining_nodes:
            if not self.coordinator.kv_held_tokens.get(node):
                adaptation.drained(node, now_s=now_s)
        outage_s = adaptation.outage_s(now_s, is_covered=self.is_covered)
        if self._replanned is not None and (outage_s > REPLAN_AFTER_S or self._replanner.is_searching):
            self._replan(adaptation, self._replanned, on_events)
        if outage_s > adaptation.longest_outage_s and not self._replanner.is_searching:
            self._tell(self.coordinator.give_up(), on_events)

    def _replan(self, adaptation: Adaptation, replanned: Callable[[Plan], Adapted], on_events: OnEvents) -> None:
        """Look for a plan of the nodes that are left, and serve it once it is found."""
        usable = adaptation.watch.states.keys() - adaptation.lost - adaptation.passed_over
        is_down = not self.is_covered and not self.coordinator.num_in_flight
        if is_down and self._replanner.start(adaptation.plan, usable):
            _log.warning("looking for a plan for %s", ", ".join(sorted(usable)))
        found = self._replanner.poll()
        if isinstance(found, Infeasible):
            _log.warning("no other plan: %s", found.reason)
        elif found is not None and is_down:
            adapted = replanned(found)
            adaptation.replace(adapted, now_s=time.perf_counter())
            kv_tokens = {node: load.kv_capacity_tokens for node, load in adapted.loads.items() if load is not None}
            self._tell(self.coordinator.replace(kv_tokens, adapted.paths), on_events)
            for node, command in adapted.loads.items():
                assert command is not None
                self.agents.send(node, command)

    def _tell(self, actions: Actions, on_events: OnEvents) -> None:
        new = on_events(actions.events)
        self._do(self.coordinator.submit(new, onto=actions) if new else actions)

    @property
    def late_iterations(self) -> int:
        """Iterations that took longer here than on the emulated devices, as far as nodes were asked."""
        return sum(self._late.values())

    def ask_counters(self) -> None:
        """Ask every node what it has done; the answers are in ``counters`` when all have come."""
        lost = self.adaptation.lost if self.adaptation is not None else frozenset()
        self._counters = {}
        self._asked = self.agents.addresses.keys() - lost
        for node in self._asked:
            self.agents.send(node, ReadCounters())

    def counters(self) -> dict[str, Counters] | None:
        """Node -> what it had done when asked, of those that are there; ``None`` while answers are missing."""
        lost = self.adaptation.lost if self.adaptation is not None else frozenset()
        return dict(self._counters) if self._asked - lost <= self._counters.keys() else None

    def _sampled(self, node: str, sampled: Sampled, on_events: OnEvents) -> None:
        if self.adaptation is not None and node in self.adaptation.lost:
            return  # its requests have gone on elsewhere
        self._tell(self.coordinator.sampled(sampled.tokens, sampled.scores), on_events)

    def _do(self, actions: Actions) -> list[TokenEvent]:
        if actions.moved and self.adaptation is not None:
            self.adaptation.moved(actions.moved, now_s=time.perf_counter())
        for node, outgoing in self.coordinator.messages(actions).items():
            work = Work(
                items=tuple(outgoing.items),
                opens=tuple(outgoing.opens),
                closes=tuple(outgoing.closes),
                due_s=due_s(self._latency_s.get(node, 0.0)),
                run=self.adaptation.run if self.adaptation is not None else "",
            )
            payload = array.array("i", outgoing.tokens).tobytes() if outgoing.tokens else None
            size = self.agents.send(node, work, payload)
            before = self.sent.get(node, LinkCounters())
            self.sent[node] = LinkCounters(
                before.payload_bytes + size, before.messages + 1, before.tokens + len(outgoing.tokens)
            )
        return actions.events
