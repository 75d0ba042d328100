"""A cluster in one process that serves a hash model: the server's coordinator, router and node runtimes, no sockets.

Messages between two ends keep their order; which of those that wait comes next, and which node runs, is drawn. Nodes
can be lost, freeze and come back, links can go down and heal, and the coordinator is told of it later, as in a server.
"""

from __future__ import annotations

import array
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence

from helixbench.profiler.cluster import COORDINATOR
from helixbench.profiler.model.hash_model import HashModel
from helixbench.profiler.model.hash_reference import Output, first_differences
from helixbench.reference_server.node.load import load_runner
from helixbench.reference_server.node.runtime import NodeRuntime, Outbound
from helixbench.reference_server.wire.messages import CannotReplay, Forget, RequestsFailed, Sampled, Work
from helixbench.solver.problem.plan import Plan
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.recover import REPLAY_MEMORY_BYTES, Paths
from helixbench.solver.scheduling.requests import Actions, Request
from helixbench.solver.scheduling.routings import make_router

Message = Work | Sampled | Forget | CannotReplay | RequestsFailed
Change = Callable[[str, Work, bytes | None], tuple[Work, bytes | None]]  # (to which node, message, payload) -> changed


class HashCluster:
    """Serves a plan.

    Args:
        plan: whose nodes there are.
        model: of the plan.
        seed: of the order of events.
        change: every message to a node passes it, to be spoiled.
        replay_memory_bytes: of each node.
    """

    def __init__(
        self,
        plan: Plan,
        model: HashModel,
        *,
        seed: int = 0,
        change: Change = lambda _, work, payload: (work, payload),
        replay_memory_bytes: int = REPLAY_MEMORY_BYTES,
    ) -> None:
        self._model = model
        self._draw = random.Random(seed)
        self._change = change
        self._router = make_router(plan, "iwrr")
        self._plan = plan
        self._replay_memory_bytes = replay_memory_bytes
        self.nodes = {name: self._make_node(name) for name in plan.placement}
        capacity = {name: node.runner.kv.capacity_tokens for name, node in self.nodes.items()}
        paths = Paths(plan.placement, plan.num_layers)
        self.coordinator = Coordinator(self._router, kv_capacity_tokens=capacity, paths=paths)
        self._frozen: set[str] = set()
        self.lost: set[str] = set()  # of which the coordinator knows
        self.links_down: set[tuple[str, str]] = set()
        self.num_faults: Counter[str] = Counter()
        self.log: list[str] = []  # what happened, in order
        self._links: dict[tuple[str, str], deque[tuple[Message, bytes | None]]] = {}  # (from, to) -> messages
        self.outputs: dict[int, list[int]] = {}  # request -> its tokens
        self.pipelines_taken: set[int] = set()

    def serve(
        self, requests: Sequence[Request], *, on_turn: Callable[[HashCluster], None] = lambda _: None
    ) -> dict[int, int]:
        """Run all of them to their end; request -> first output token that is not the reference's.

        ``on_turn`` is called between any two events, to do harm. What it did is mended when nothing goes on any more.
        """
        self._do(self.coordinator.submit(requests))
        while self.turn():
            on_turn(self)
        self.mend()
        while self.turn():
            pass
        coordinator = self.coordinator
        left = coordinator.num_in_flight + coordinator.num_waiting + coordinator.num_recovering
        assert left == 0, f"{left} requests did not end"
        assert {node: node_.runner.kv.used_tokens for node, node_ in self.nodes.items()} == dict.fromkeys(self.nodes, 0)
        assert set(coordinator.kv_held_tokens.values()) == {0}
        outputs = [Output(request.number, request.prompt, self.outputs[request.number]) for request in requests]
        assert [len(output.tokens) for output in outputs] == [request.max_tokens for request in requests]
        return first_differences(outputs, num_layers=self._model.num_layers, vocab_size=self._model.vocab_size)

    def mend(self) -> None:
        """Bring back every node, heal every link."""
        for link in sorted(self.links_down):
            self.heal(link)
        for name in sorted(self.lost):
            self.bring_back(name)

    def turn(self) -> bool:
        """One event, drawn: a message arrives, or a node runs an iteration; ``False`` where nothing is left."""
        run_tokens = {True: 0, False: 0}
        waiting = [pair for pair, messages in self._links.items() if messages and self._is_open(pair)]
        ready = [name for name, node in self.nodes.items() if node.has_work and name not in self._frozen]
        if not waiting and not ready:
            return False
        # Iterations are drawn less often than messages, so that batches are of several requests.
        if ready and (not waiting or self._draw.random() < 0.2):
            name = self._draw.choice(ready)
            node = self.nodes[name]
            going = node.run_batch(run_tokens)
            self.log.append(f"{name} runs {[item.request for _, item in node.shape]}")
            node.ended()
            self._send(name, going)
        else:
            src, dst = self._draw.choice(waiting)
            message, payload = self._links[src, dst].popleft()
            self.log.append(f"{src} -> {dst}: {message}")
            if dst == COORDINATOR:
                self._tell_coordinator(src, message)
            elif isinstance(message, Forget):
                self.nodes[dst].close_all()
            elif dst in self.nodes:
                assert isinstance(message, Work)
                self._send(dst, self.nodes[dst].accept(*self._change(dst, message, payload)))
        return True

    def kill(self, name: str) -> None:
        """The node and all that was on its way to it are gone; the coordinator is told at once."""
        del self.nodes[name]
        self._frozen.discard(name)
        self.lost.add(name)
        for (src, dst), messages in self._links.items():
            if dst == name or (src == name and self._draw.random() < 0.5):
                messages.clear()
        self._observe("kill")

    def freeze(self, name: str) -> None:
        """The node does nothing, and keeps all that it has; the coordinator takes it for lost."""
        self._frozen.add(name)
        self.lost.add(name)
        self._observe("freeze")

    def bring_back(self, name: str) -> None:
        """A killed node comes back empty; a frozen one goes on with what it had, and is told to forget it."""
        if name in self._frozen:
            self._frozen.discard(name)
            self._links.setdefault((COORDINATOR, name), deque()).append((Forget(), None))
        else:
            self.nodes[name] = self._make_node(name)
        self.lost.discard(name)
        self._observe("bring back")

    def cut(self, link: tuple[str, str]) -> None:
        """The link carries nothing, what is on it is held; the coordinator is told at once."""
        self.links_down.add(link)
        self._observe("cut")

    def heal(self, link: tuple[str, str]) -> None:
        """What was held is delivered from now on, late."""
        self.links_down.discard(link)
        self._observe("heal")

    def _observe(self, fault: str) -> None:
        self.num_faults[fault] += 1
        self.log.append(f"{fault}: lost {sorted(self.lost)}, down {sorted(self.links_down)}")
        actions = self.coordinator.observe(lost=self.lost, links_down=self.links_down)
        self._do(actions)

    def _is_open(self, link: tuple[str, str]) -> bool:
        return link not in self.links_down and link[1] not in self._frozen

    def _make_node(self, name: str) -> NodeRuntime:
        held, node = self._plan.placement[name], self._plan.nodes[name]
        runner = load_runner(
            self._model,
            start=held.start,
            end=held.end,
            kv_capacity_tokens=_known(node.kv_capacity_tokens),
            dtype=self._plan.dtype,
            device="cpu",
        )
        return NodeRuntime(
            name,
            runner,
            max_batch_tokens=_known(node.max_batch_tokens),
            replay_memory_bytes=self._replay_memory_bytes,
        )

    def _send(self, src: str, going: Sequence[Outbound]) -> None:
        for out in going:
            payload = None if out.payload is None else bytes(out.payload)
            self._links.setdefault((src, out.peer or COORDINATOR), deque()).append((out.message, payload))

    def _tell_coordinator(self, src: str, message: object) -> None:
        if src in self.lost:
            return  # as a server does: what a lost node says is not heard
        if isinstance(message, Sampled):
            late = self.coordinator.num_late
            self._do(self.coordinator.sampled(message.tokens))
            self.num_faults["late"] += self.coordinator.num_late - late
        else:
            assert isinstance(message, CannotReplay), message
            self.num_faults["cannot replay"] += 1
            self._do(self.coordinator.cannot_replay(message.attempt, src))

    def _do(self, actions: Actions) -> None:
        for moved in actions.moved:
            if moved.recovery is not None and moved.recovery.num_rebuilt:
                self.num_faults["replay" if moved.recovery.source is not None else "prefill again"] += 1
        for name, outgoing in self.coordinator.messages(actions).items():
            work = Work(items=tuple(outgoing.items), opens=tuple(outgoing.opens), closes=tuple(outgoing.closes))
            payload = array.array("i", outgoing.tokens).tobytes() if outgoing.tokens else None
            self._links.setdefault((COORDINATOR, name), deque()).append((work, payload))
        for event in actions.events:
            assert event.token is not None
            assert event.pipeline is not None
            self.outputs.setdefault(event.request, []).append(event.token)
            self.pipelines_taken.add(event.pipeline)


def mixed_requests(count: int, *, seed: int, vocab_size: int) -> list[Request]:
    """Prompts of 1 to 60 tokens, outputs of 1 to 24."""
    draw = random.Random(seed)
    return [
        Request(
            number=number,
            prompt=tuple(draw.randrange(vocab_size) for _ in range(draw.randrange(1, 61))),
            max_tokens=draw.randrange(1, 25),
        )
        for number in range(count)
    ]


def _known(value: int | None) -> int:
    assert value is not None
    return value
