"""A simulated cluster: nodes, links and a coordinator on a virtual clock, under the rules of ``solver.scheduling``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from helixbench.profiler.cluster import COORDINATOR as COORDINATOR_NAME
from helixbench.profiler.cluster import ClusterProfile
from helixbench.profiler.cost.model import StageCost
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.scheduling.batcher import Batcher, Chunk
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.recover import Paths
from helixbench.solver.scheduling.requests import Actions, DecodeGroup, InFlight, Moved, Request
from helixbench.solver.scheduling.router import Chooser
from helixbench.solver.scheduling.work import WorkItem
from helixbench.solver.simulation.event_loop import COORDINATOR, EventLoop
from helixbench.solver.simulation.links import SimulatedLinks
from helixbench.solver.simulation.node import Message, OnIteration, SimulatedNode
from helixbench.solver.simulation.stage_time import StageTimer


class Clients(Protocol):
    """Where requests come from, and who is told what becomes of them."""

    def following(self, num_waiting: int, now_s: float) -> Sequence[Request]:
        """Requests that arrive at this moment by themselves, while so many wait to be admitted; asked until empty."""
        ...

    def admitted(self, requests: Sequence[InFlight], now_s: float) -> None:
        """These requests were admitted."""
        ...

    def answered(self, num_tokens: int, began: Sequence[InFlight], ended: Sequence[InFlight], now_s: float) -> None:
        """So many tokens reached their clients, the first of those that ``began``, the last of those that ``ended``."""
        ...


@dataclass(frozen=True)
class NodeSetup:
    """A node of the cluster: its layers, its cost, and how much it runs and admits at once."""

    held: LayerRange
    cost: StageCost
    max_batch_tokens: int
    kv_slots: int


@dataclass
class LinkCount:
    """A link in use, and what has crossed it so far; ``deliver`` takes what arrives."""

    bytes_per_token: float
    deliver: Callable[[Any], None]
    messages: int = 0
    tokens: int = 0


class SimulatedCluster:
    """Serves the requests of its clients. The caller starts it and runs ``loop``.

    The coordinator takes messages one after another, each for as long as the profile says: ``message_s``, ``token_s``
    for each token in it, ``request_s`` for each request that ends. What a message causes is sent when that time is
    over. Opening a request on the nodes of its pipeline takes no time and no bandwidth.

    Args:
        profile: the cluster.
        setups: node -> its setup, for those that the router uses.
        router: chooses pipelines.
        clients: send requests.
        max_decode_batch: decoding sequences in an iteration at most; ``None`` for no limit.
        max_concurrency: requests in flight at most; ``None`` for as many as the KV caches hold.
        seed: of the scatter of iteration times.
        on_iteration: called at the end of every iteration.
        on_answer: called when a message has been answered.
        on_moved: called when requests lost their pipeline, or go on another one.
        paths: where they can go on; ``None`` where nothing is ever lost.
    """

    def __init__(
        self,
        profile: ClusterProfile,
        setups: Mapping[str, NodeSetup],
        router: Chooser,
        clients: Clients,
        *,
        max_decode_batch: int | None = None,
        max_concurrency: int | None = None,
        seed: int = 0,
        on_iteration: OnIteration | None = None,
        on_answer: Callable[[], None] = lambda: None,
        on_moved: Callable[[Sequence[Moved]], None] = lambda _: None,
        paths: Paths | None = None,
    ) -> None:
        self.loop = EventLoop()
        self.links = SimulatedLinks(profile, self.loop)
        self.link_counts: dict[tuple[str, str], LinkCount] = {}  # (from, to) -> what crossed the link
        self.coordinator = Coordinator(
            router,
            kv_capacity_tokens={name: setup.kv_slots for name, setup in setups.items()},
            max_concurrency=max_concurrency,
            paths=paths,
        )
        self._on_moved = on_moved
        self._rebuilding: dict[InFlight, str] = {}  # request that runs again -> the last node where all tokens do
        self.ending: Sequence[InFlight] = ()  # requests that have ended, of which their clients are not told yet
        num_layers = profile.model.num_layers
        self.nodes = {
            name: SimulatedNode(
                name,
                self.loop,
                router.pipelines,
                is_last=setup.held.end == num_layers,
                timer=StageTimer(setup.cost, setup.held, num_layers=num_layers, seed=f"{seed} {name}"),
                batcher=Batcher(max_batch_tokens=setup.max_batch_tokens, max_decode_batch=max_decode_batch),
                send=self._send,
                on_iteration=on_iteration,
            )
            for name, setup in setups.items()
        }
        self._profile, self._router, self._clients, self._on_answer = profile, router, clients, on_answer
        self._inbox: deque[list[DecodeGroup] | Request] = deque()  # tokens from a node, or a request from outside
        self._is_busy = False  # the coordinator is

    def observe(
        self, *, lost: Collection[str], passed_over: Collection[str], links_down: Collection[tuple[str, str]]
    ) -> None:
        """The state of nodes and links is now this; see ``Coordinator.observe``."""
        actions = self.coordinator.observe(lost=lost, passed_over=passed_over, links_down=links_down)
        self._forget({moved.state for moved in actions.moved})
        self._send_all(self._refill(actions))

    def _forget(self, states: Collection[InFlight]) -> None:
        """Nothing of these requests is queued, runs or is on its way any more; it is late, and would be dropped."""
        if not states:
            return
        for node in self.nodes.values():
            node.forget(states)
        for argument in [*self.loop.arguments, *self.links.held, *self._inbox]:
            for part in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(part, Message):
                    part.drop(states)
                elif isinstance(part, Actions):
                    for group in part.going.values():
                        group.drop(states)
                elif isinstance(part, list):
                    for group in part:
                        if isinstance(group, DecodeGroup):
                            group.drop(states)

    def start(self, _: None = None) -> None:
        """Admit the requests that are there from the start."""
        self._send_all(self._refill(Actions()))

    def arrive(self, request: Request) -> None:
        """A request comes from outside."""
        self._receive(request)

    def _receive(self, message: list[DecodeGroup] | Request) -> None:
        self._inbox.append(message)
        self._take()

    def _take(self) -> None:
        """The coordinator takes the next message, if it is free."""
        while self._inbox and not self._is_busy:
            message = self._inbox.popleft()
            if isinstance(message, Request):
                self._send_all(self.coordinator.submit([message]))
                continue
            message = [group for group in message if group.members]
            if not message:
                continue
            num_tokens = sum(group.count for group in message)
            began = [group.members[0] for group in message if group.members[0].num_output == 0]
            actions = self.coordinator.advance(message)
            times = self._profile.coordinator
            work_s = (times.message_s or 0.0) + num_tokens * (times.token_s or 0.0)
            work_s += len(actions.ended) * (times.request_s or 0.0)
            self._is_busy = True
            self.ending = actions.ended
            self.loop.at(self.loop.now_s + work_s, COORDINATOR, self._answer, (num_tokens, began, actions))

    def _answer(self, work: tuple[int, list[InFlight], Actions]) -> None:
        """Tokens reach their clients, requests are admitted, and the next tokens go to the first nodes."""
        num_tokens, began, actions = work
        self._clients.answered(num_tokens, began, actions.ended, self.loop.now_s)
        self.ending = ()
        if self._rebuilding:
            for state in actions.ended:
                self._rebuilding.pop(state, None)
        self._send_all(self._refill(self.coordinator.admit(onto=actions)))
        self._is_busy = False
        self._on_answer()
        self._take()

    def _refill(self, actions: Actions) -> Actions:
        while new := self._clients.following(self.coordinator.num_waiting, self.loop.now_s):
            self.coordinator.submit(new, onto=actions)
        return actions

    def _send_all(self, actions: Actions) -> None:
        """One message to each first node. Of a request that ends only a node that may wait for it has to know."""
        if actions.admitted:
            self._clients.admitted(actions.admitted, self.loop.now_s)
        pipelines = self._router.pipelines
        if actions.moved:
            self._on_moved(actions.moved)
            self._send_again(actions.moved)
        messages: dict[str, Message] = {}
        for state in actions.ended:
            hops = pipelines[state.pipeline]
            if len(hops) == 1:
                messages.setdefault(hops[0].node, Message()).ended.append(state)
        for group in actions.going.values():
            if not group.members:
                continue  # all of them have moved since
            message = messages.setdefault(pipelines[group.pipeline][0].node, Message())
            message.work.append(group)
            message.num_tokens += group.count
        for state in actions.admitted:
            item = WorkItem(state.request.number, 0, len(state.request.prompt), sample=True, is_decode=False)
            message = messages.setdefault(pipelines[state.pipeline][0].node, Message())
            message.work.append(Chunk(item, state, 0))
            message.num_tokens += item.num_tokens
        for node, message in messages.items():
            self._send(COORDINATOR_NAME, node, message.num_tokens, message)

    def _send_again(self, moved: Sequence[Moved]) -> None:
        """Tokens that run again: from the node that kept their states, or from the coordinator.

        The newest token is taken to travel with the others, not by a way of its own through the nodes before them.
        """
        for one in moved:
            recovery, state = one.recovery, one.state
            if recovery is None:
                continue
            begin, first = (0, recovery.first) if recovery.num_rebuilt else (state.context_tokens - 1, 0)
            if recovery.num_rebuilt:
                self._rebuilding[state] = recovery.hops[recovery.first + recovery.num_rebuilt - 1].node
            message = Message()
            message.num_tokens = state.context_tokens - begin
            item = WorkItem(state.request.number, begin, message.num_tokens, sample=True, is_decode=False)
            message.work.append(Chunk(item, state, 0))
            source = recovery.hops[first - 1].node if first else COORDINATOR_NAME
            self._send(source, recovery.hops[first].node, message.num_tokens, message)
        for node in self.nodes.values():
            node.rebuilding = self._rebuilding

    def _send(self, src: str, dst: str, tokens: int, message: Any) -> None:
        ends = (src, dst)
        count = self.link_counts.get(ends)
        if count is None:
            deliver = self._receive if dst == COORDINATOR_NAME else self.nodes[dst].receive
            count = self.link_counts[ends] = LinkCount(self._profile.bytes_per_token(src, dst), deliver)
        count.messages += 1
        count.tokens += tokens
        self.links.send(src, dst, tokens * count.bytes_per_token, count.deliver, message)
