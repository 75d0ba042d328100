"""The server and the simulation decide alike: one recorded list of events goes through both.

A simulation records what happens and when: requests that arrive, messages that are delivered, iterations that begin and
end. The same events, at the same times, then go through the coordinator and the node runtimes that a server runs. At
each of them both must have decided the same: the pipeline of each request, what each iteration runs, in order, and how
long a node waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import pytest

from helixbench.profiler.cluster import COORDINATOR, ClusterProfile
from helixbench.profiler.stage.batch import StageItem
from helixbench.reference_server.node.runtime import NodeRuntime, Outbound
from helixbench.reference_server.simulation import Arrivals, SimulationConfig, simulate
from helixbench.reference_server.wire.messages import Sampled, Work
from helixbench.solver.problem.plan import LayerRange, Plan
from helixbench.solver.scheduling.batcher import Batcher, Chunk
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.requests import Actions, DecodeGroup, Request
from helixbench.solver.scheduling.routings import make_router
from helixbench.solver.scheduling.work import OpenRequest, WorkItem
from helixbench.solver.simulation.cluster import SimulatedCluster
from helixbench.solver.simulation.node import SimulatedNode
from tests.reference_server.simulation.cases import MIXED, OFFLINE, closed, cluster, four_nodes, plan_of

TOKEN = 3  # of every sequence, every time


class Arrives(NamedTuple):
    """A request comes from outside."""

    at_s: float
    request: Request


class Delivered(NamedTuple):
    """The oldest message on its way from one node to another has come."""

    at_s: float
    src: str
    dst: str


class Coordinated(NamedTuple):
    """The coordinator is done with its oldest message, and these requests arrive at that moment."""

    at_s: float
    new: tuple[Request, ...]
    pipelines: tuple[tuple[int, int], ...]  # admitted request, index of its pipeline


class Waits(NamedTuple):
    """A node with work does not begin an iteration yet."""

    at_s: float
    node: str
    wait_s: float


class Begins(NamedTuple):
    """A node begins an iteration."""

    at_s: float
    node: str
    batch: tuple[WorkItem, ...]


class Ends(NamedTuple):
    """A node ends its iteration."""

    at_s: float
    node: str


Event = Arrives | Delivered | Coordinated | Waits | Begins | Ends


class RecordingNode(SimulatedNode):
    """Notes waits, and iterations that begin and end."""

    def __init__(self, *args: Any, batcher: Batcher[DecodeGroup], events: list[Event], **options: Any) -> None:
        super().__init__(*args, batcher=batcher, **options)
        self._events, self._ran = events, batcher.next_batch
        batcher.next_batch = self._noted_batch  # type: ignore[method-assign]
        wait_s = self._gather.wait_s
        self._gather.wait_s = lambda now_s: self._noted_wait_s(wait_s(now_s))  # type: ignore[method-assign]

    def _noted_batch(self) -> tuple[list[DecodeGroup], list[Chunk]]:
        decodes, chunks = self._ran()
        items = [
            WorkItem(member.request.number, member.context_tokens - 1, 1, sample=True, is_decode=True)
            for group in decodes
            for member in group.members
        ]
        self._events.append(Begins(self._loop.now_s, self.name, (*items, *(chunk.item for chunk in chunks))))
        return decodes, chunks

    def _noted_wait_s(self, wait_s: float) -> float:
        if wait_s > 0:
            self._events.append(Waits(self._loop.now_s, self.name, wait_s))
        return wait_s

    def _end(self, ran: Any) -> None:
        self._events.append(Ends(self._loop.now_s, self.name))
        super()._end(ran)


class RecordingCluster(SimulatedCluster):
    """Notes arrivals, deliveries and what the coordinator admits."""

    events: list[Event]

    def __init__(self, *args: Any, **options: Any) -> None:
        self.events = []
        self._new: list[Request] = []
        super().__init__(*args, **options)

    def arrive(self, request: Request) -> None:
        self.events.append(Arrives(self.loop.now_s, request))
        super().arrive(request)

    def _refill(self, actions: Actions) -> Actions:
        submit = self.coordinator.submit

        def noted(requests: Sequence[Request], **options: Any) -> Actions:
            self._new += requests
            return submit(requests, **options)

        self.coordinator.submit = noted  # type: ignore[method-assign, assignment]
        super()._refill(actions)
        self.coordinator.submit = submit  # type: ignore[method-assign]
        return actions

    def _send_all(self, actions: Actions) -> None:
        admitted = tuple((state.request.number, state.pipeline) for state in actions.admitted)
        self.events.append(Coordinated(self.loop.now_s, tuple(self._new), admitted))
        self._new = []
        super()._send_all(actions)

    def _send(self, src: str, dst: str, tokens: int, message: Any) -> None:
        deliver = self._receive if dst == COORDINATOR else self.nodes[dst].receive

        def noted(message: Any) -> None:
            self.events.append(Delivered(self.loop.now_s, src, dst))
            deliver(message)

        self.links.send(src, dst, tokens * self._profile.bytes_per_token(src, dst), noted, message)


class Output(msgspec.Struct):
    items: tuple[StageItem, ...]


class SameToken:
    """A stage without layers: every sequence gets one token again and again."""

    hidden_dtype, weight_bytes, kv = "none", 0, None

    def __init__(self, held: LayerRange, *, is_last: bool) -> None:
        self.start, self.end, self.is_last = held.start, held.end, is_last

    def read(self, payload: Any, *, num_tokens: int, dtype: str) -> list[None]:
        return [None] * num_tokens

    def open(self, opened: OpenRequest) -> None:
        pass

    def close(self, request: int) -> None:
        pass

    def drop(self) -> None:
        pass

    def forward(self, items: Sequence[StageItem]) -> Output:
        return Output(tuple(sorted(items, key=lambda item: item.entry_layer)))

    def sample(self, output: Output) -> tuple[Sampled, tuple[int, ...]]:
        return Sampled(tuple((item.request, TOKEN) for item in output.items if item.sample)), ()

    def write(self, output: Output, rows: Sequence[slice]) -> memoryview:
        return memoryview(b"")


class Server:
    """The coordinator and the nodes of a server on a clock that the recorded events set."""

    def __init__(self, plan: Plan, config: SimulationConfig, kv_slots: dict[str, int]) -> None:
        router = make_router(plan, config.routing, seed=config.seed)
        self.coordinator = Coordinator(
            router,
            kv_capacity_tokens=kv_slots,
            max_concurrency=None if config.is_closed_loop else config.concurrency,
        )
        self.now_s = 0.0
        self.nodes: dict[str, NodeRuntime] = {}
        for name, held in plan.placement.items():
            most = plan.nodes[name].max_batch_tokens
            assert most is not None
            runner: Any = SameToken(held, is_last=held.end == plan.num_layers)
            self.nodes[name] = NodeRuntime(name, runner, max_batch_tokens=most, max_decode_batch=plan.max_decode_batch)
            self.nodes[name]._clock = lambda: self.now_s
        self._on_way: dict[tuple[str, str], deque[Any]] = {}  # (from, to) -> messages, the oldest first
        self._inbox: deque[Sampled | Request | None] = deque([None])  # of the coordinator; ``None``: it starts
        self._results: dict[str, list[Outbound]] = {}  # node -> what its iteration gives when it ends
        self._batches: dict[str, tuple[WorkItem, ...]] = {}

    def replay(self, events: Sequence[Event]) -> None:
        for event in events:
            assert event.at_s >= self.now_s
            self.now_s = event.at_s
            getattr(self, f"_{type(event).__name__.lower()}")(event)

    def _arrives(self, event: Arrives) -> None:
        self._inbox.append(event.request)

    def _delivered(self, event: Delivered) -> None:
        message = self._on_way[event.src, event.dst].popleft()
        if event.dst == COORDINATOR:
            self._inbox.append(message)
        else:
            self.nodes[event.dst].accept(message, None)

    def _coordinated(self, event: Coordinated) -> None:
        message = self._inbox.popleft()
        if isinstance(message, Request):
            actions = self.coordinator.submit([message])
        else:
            actions = Actions() if message is None else self.coordinator.sampled(message.tokens)
            self.coordinator.submit(event.new, onto=actions)
        admitted = tuple((state.request.number, state.pipeline) for state in actions.admitted)
        assert admitted == event.pipelines, event
        for node, outgoing in self.coordinator.messages(actions).items():
            work = Work(items=tuple(outgoing.items), opens=tuple(outgoing.opens), closes=tuple(outgoing.closes))
            if work.items or any(self._is_alone(state.pipeline, node) for state in actions.ended):
                self._send(COORDINATOR, node, work)
            else:  # a request that opens or closes costs a simulated node no time
                self.nodes[node].accept(work, None)

    def _is_alone(self, pipeline: int, node: str) -> bool:
        hops = self.coordinator._router.pipelines[pipeline]
        return len(hops) == 1 and hops[0].node == node

    def _waits(self, event: Waits) -> None:
        assert self.nodes[event.node].has_work
        assert self.nodes[event.node].wait_s() == event.wait_s, event

    def _begins(self, event: Begins) -> None:
        node = self.nodes[event.node]
        assert node.wait_s() == 0, event
        next_batch, ran = node._batcher.next_batch, list[WorkItem]()

        def noted() -> Any:
            decodes, prompts = next_batch()
            ran.extend(chunk.item for chunk in decodes + prompts)
            return decodes, prompts

        node._batcher.next_batch = noted  # type: ignore[method-assign]
        self._results[event.node] = node.run_batch({True: 0, False: 0})
        node._batcher.next_batch = next_batch  # type: ignore[method-assign]
        assert tuple(ran) == event.batch, event

    def _ends(self, event: Ends) -> None:
        self.nodes[event.node].ended()
        for outbound in self._results.pop(event.node):
            self._send(event.node, outbound.peer or COORDINATOR, outbound.message)

    def _send(self, src: str, dst: str, message: Any) -> None:
        self._on_way.setdefault((src, dst), deque()).append(message)


def near() -> tuple[ClusterProfile, Plan]:
    """A node that holds the whole model, near enough for it to wait, and a pipeline of two that shares nothing."""
    profile = cluster({"a": 1.0, "b": 1.0, "c": 1.0}, latency_s=1e-4)
    plan = plan_of(profile, {"a": (0, 8), "b": (0, 3), "c": (3, 8)}, [(["a"], 2.0), (["b", "c"], 1.0)])
    return profile, plan


def full() -> tuple[ClusterProfile, Plan]:
    """Four nodes, three pipelines, late entries, and so little KV cache that requests wait for it."""
    return four_nodes(memory_bytes=8e6)


def limited() -> tuple[ClusterProfile, Plan]:
    """Limits on iterations, which divide the sequences that come together."""
    profile, plan = four_nodes()
    return profile, msgspec.structs.replace(plan, max_decode_batch=5)


CONFIGS = {
    "closed loop": closed(40, workload=MIXED, num_requests=120),
    "few in flight": closed(3, workload=MIXED, num_requests=60),
    "offline": SimulationConfig(workload=MIXED, arrivals=OFFLINE, num_requests=150, duration_s=None, warmup_s=0.0),
    "poisson": SimulationConfig(
        workload=MIXED,
        arrivals=Arrivals(kind="poisson", rate_per_s=80.0),
        concurrency=24,
        num_requests=150,
        duration_s=None,
        warmup_s=0.0,
    ),
    "shortest queue": closed(24, workload=MIXED, num_requests=80, routing="shortest-queue"),
}


def record(profile: ClusterProfile, plan: Plan, config: SimulationConfig) -> RecordingCluster:
    """Simulate, and note every event."""
    recorded: list[RecordingCluster] = []

    def cluster_of(*args: Any, **options: Any) -> RecordingCluster:
        recorded.append(RecordingCluster(*args, **options))
        return recorded[-1]

    def node_of(*args: Any, send: Any, **options: Any) -> RecordingNode:
        return RecordingNode(*args, send=send, events=send.__self__.events, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helixbench.reference_server.simulation.simulator.SimulatedCluster", cluster_of)
        patch.setattr("helixbench.solver.simulation.cluster.SimulatedNode", node_of)
        simulate(plan, profile, config)
    return recorded[0]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("case", [near, full, limited])
def test_the_server_decides_as_the_simulation_does(
    case: Callable[[], tuple[ClusterProfile, Plan]], config: SimulationConfig
) -> None:
    profile, plan = case()
    simulated = record(profile, plan, config)
    server = Server(plan, config, dict(simulated.coordinator._capacity))

    server.replay(simulated.events)

    kinds = {type(event) for event in simulated.events}
    assert {Delivered, Coordinated, Begins, Ends} <= kinds
    assert (Arrives in kinds) == (config.arrivals.kind == "poisson")
    assert (Waits in kinds) == (case is near)
    assert sum(isinstance(event, Begins) for event in simulated.events) > 100
    assert server.coordinator.num_in_flight == simulated.coordinator.num_in_flight


def test_a_rule_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that runs the newest prompt first."""
    profile, plan = full()
    config = CONFIGS["closed loop"]
    simulated = record(profile, plan, config)
    server = Server(plan, config, dict(simulated.coordinator._capacity))
    original = Batcher.add_prompt

    def newest_first(self: Batcher[Any], item: WorkItem, inputs: Any) -> None:
        original(self, item, inputs)
        self._prompts.rotate(1)

    monkeypatch.setattr(Batcher, "add_prompt", newest_first)
    with pytest.raises(AssertionError, match="Begins"):
        server.replay(simulated.events)
