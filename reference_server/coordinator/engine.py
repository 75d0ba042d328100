"""Engine: the coordinator run for real. Its decisions go out over the wire, tokens that come in go to it."""

from __future__ import annotations

import array
import time
from collections.abc import Callable, Iterable, Sequence

from helixbench.errors import InputError, MeasurementError
from helixbench.profiler.cluster import COORDINATOR
from helixbench.profiler.model.model import Model
from helixbench.reference_server.testbed.emulation import Timing
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.held import due_s
from helixbench.reference_server.wire.messages import Counters, LinkCounters, Load, Loaded, ReadCounters, Sampled, Work
from helixbench.solver.problem.plan import Pipeline, Plan
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.requests import Actions, Request, TokenEvent
from helixbench.solver.scheduling.routings import make_router, peers_of
from helixbench.solver.scheduling.work import Routing

_LOAD_TIMEOUT_S = 300.0
_SILENCE_S = 120.0  # of the devices' time, without a token while requests are in flight: something hangs


class Engine:
    """Serves a plan on loaded agents. Not thread-safe: one thread calls it.

    Attributes:
        timing: of the testbed.
        is_emulated: whether some node keeps the times of an emulated device.
    """

    def __init__(
        self,
        agents: Agents,
        coordinator: Coordinator,
        pipelines: Sequence[Pipeline],
        timing: Timing = Timing(),  # noqa: B008 - frozen
    ) -> None:
        self.agents = agents
        self.timing = timing
        self.is_emulated = False
        self._late: dict[str, int] = {}  # node -> its late iterations, when last asked
        self._latency_s = timing.held_s(COORDINATOR)  # node -> seconds that messages there are held
        self.coordinator = coordinator
        self.pipelines = pipelines
        self.sent: dict[str, LinkCounters] = {}  # node -> what went there
        self._counters: dict[str, Counters] = {}  # node -> its answer to the question under way
        self._last_heard = time.monotonic()

    def submit(self, requests: Iterable[Request]) -> list[TokenEvent]:
        """New requests; see ``Coordinator.submit``."""
        if self.coordinator.num_in_flight == 0:
            self._last_heard = time.monotonic()
        return self._do(self.coordinator.submit(requests))

    def abort(self, number: int) -> list[TokenEvent]:
        """A client has gone; see ``Coordinator.abort``."""
        return self._do(self.coordinator.abort(number))

    def step(
        self, timeout_ms: int, *, on_events: Callable[[list[TokenEvent]], list[Request]] = lambda _events: []
    ) -> None:
        """Take what agents sent and answer it.

        Args:
            timeout_ms: wait at most this long for something to come.
            on_events: told what each message does to requests; the requests that it returns arrive in that moment, so
                they travel in the same messages as what the message set off (closed loop).

        Raises:
            MeasurementError: an agent died, failed, or hangs.
        """
        for node, answer in self.agents.receive(timeout_ms):
            if isinstance(answer, Sampled):
                self._last_heard = time.monotonic()
                self._sampled(node, answer, on_events)
            elif isinstance(answer, Counters):
                self._counters[node] = answer
                self._late[node] = answer.late_iterations
            else:
                raise MeasurementError(f"node {node}: {type(answer).__name__} was not asked for")
        silence_s = _SILENCE_S * self.timing.time_scale
        if self.coordinator.num_in_flight and time.monotonic() - self._last_heard > silence_s:
            raise MeasurementError(f"no token within {silence_s:.0f} s with {self.coordinator.num_in_flight} in flight")

    @property
    def late_iterations(self) -> int:
        """Iterations that took longer here than on the emulated devices, as far as nodes were asked."""
        return sum(self._late.values())

    def ask_counters(self) -> None:
        """Ask every node what it has done; the answers are in ``counters`` when all have come."""
        self._counters = {}
        for node in self.agents.addresses:
            self.agents.send(node, ReadCounters())

    def counters(self) -> dict[str, Counters] | None:
        """Node -> what it had done when asked; ``None`` while answers are missing."""
        return dict(self._counters) if len(self._counters) == len(self.agents.addresses) else None

    def _sampled(self, node: str, sampled: Sampled, on_events: Callable[[list[TokenEvent]], list[Request]]) -> None:
        try:
            actions = self.coordinator.sampled(sampled.tokens, sampled.scores)
        except KeyError as error:
            raise MeasurementError(f"node {node}: sent a token for request {error}, which is not in flight") from error
        new = on_events(actions.events)
        self._do(self.coordinator.submit(new, onto=actions) if new else actions)

    def _do(self, actions: Actions) -> list[TokenEvent]:
        for node, outgoing in self.coordinator.messages(actions).items():
            work = Work(
                items=tuple(outgoing.items),
                opens=tuple(outgoing.opens),
                closes=tuple(outgoing.closes),
                due_s=due_s(self._latency_s.get(node, 0.0)),
            )
            payload = array.array("i", outgoing.tokens).tobytes() if outgoing.tokens else None
            size = self.agents.send(node, work, payload)
            before = self.sent.get(node, LinkCounters())
            self.sent[node] = LinkCounters(
                before.payload_bytes + size, before.messages + 1, before.tokens + len(outgoing.tokens)
            )
        return actions.events


def load_plan(
    agents: Agents,
    plan: Plan,
    files: Model,
    *,
    routing: Routing = "iwrr",
    seed: int = 0,
    max_concurrency: int | None = None,
    timing: Timing = Timing(),  # noqa: B008 - frozen
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

    Raises:
        InputError: a plan of a cluster that was not measured here, so that it does not say how to serve it.
        AgentFailedError: a range does not fit, or the model differs on a node.
        MeasurementError: an agent does not answer.
    """
    router = make_router(plan, routing, seed=seed)
    peers = peers_of(plan, router)
    commands = {
        node: Load(
            model=str(files.directory),
            model_digest=files.digest(),
            dtype=plan.dtype,
            node=node,
            start=held.start,
            end=held.end,
            kv_capacity_tokens=_served(node, "kv_capacity_tokens", plan.nodes[node].kv_capacity_tokens),
            max_batch_tokens=_served(node, "max_batch_tokens", plan.nodes[node].max_batch_tokens),
            max_decode_batch=plan.max_decode_batch,
            peers={peer: agents.addresses[peer] for peer in sorted(peers[node])},
            latency_s=timing.held_s(node),
        )
        for node, held in plan.placement.items()
    }
    loaded = agents.ask(commands, Loaded, timeout_s=_LOAD_TIMEOUT_S)
    coordinator = Coordinator(
        router,
        kv_capacity_tokens={node: answer.kv_capacity_tokens for node, answer in loaded.items()},
        max_concurrency=max_concurrency,
    )
    return Engine(agents, coordinator, router.pipelines, timing)


def _served(node: str, field: str, value: int | None) -> int:
    if value is None:
        raise InputError(
            f"plan: nodes.{node}.{field} is missing; only a plan of a cluster profiled by helixbench can be served"
        )
    return value
