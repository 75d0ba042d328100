"""A cluster in one process that serves a hash model: the server's coordinator, router and node runtimes, no sockets.

Messages between two ends keep their order; which of those that wait comes next, and which node runs, is drawn.
"""

from __future__ import annotations

import array
import random
from collections import deque
from collections.abc import Callable, Sequence

from helixbench.profiler.cluster import COORDINATOR
from helixbench.profiler.model.hash_model import HashModel
from helixbench.profiler.model.hash_reference import Output, first_differences
from helixbench.reference_server.node.load import load_runner
from helixbench.reference_server.node.runtime import NodeRuntime
from helixbench.reference_server.wire.messages import Sampled, Work
from helixbench.solver.problem.plan import Plan
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.requests import Actions, Request
from helixbench.solver.scheduling.routings import make_router

Change = Callable[[str, Work, bytes | None], tuple[Work, bytes | None]]  # (to which node, message, payload) -> changed


class HashCluster:
    """Serves a plan.

    Args:
        plan: whose nodes there are.
        model: of the plan.
        seed: of the order of events.
        change: every message to a node passes it, to be spoiled.
    """

    def __init__(
        self, plan: Plan, model: HashModel, *, seed: int = 0, change: Change = lambda _, work, payload: (work, payload)
    ) -> None:
        self._model = model
        self._draw = random.Random(seed)
        self._change = change
        self._router = make_router(plan, "iwrr")
        self.nodes = {
            name: NodeRuntime(
                name,
                load_runner(
                    model,
                    start=held.start,
                    end=held.end,
                    kv_capacity_tokens=_known(plan.nodes[name].kv_capacity_tokens),
                    dtype=plan.dtype,
                    device="cpu",
                ),
                max_batch_tokens=_known(plan.nodes[name].max_batch_tokens),
            )
            for name, held in plan.placement.items()
        }
        capacity = {name: node.runner.kv.capacity_tokens for name, node in self.nodes.items()}
        self._coordinator = Coordinator(self._router, kv_capacity_tokens=capacity)
        self._links: dict[tuple[str, str], deque[tuple[Work | Sampled, bytes | None]]] = {}  # (from, to) -> messages
        self.outputs: dict[int, list[int]] = {}  # request -> its tokens
        self.pipelines_taken: set[int] = set()

    def serve(self, requests: Sequence[Request]) -> dict[int, int]:
        """Run all of them to their end; request -> first output token that is not the reference's."""
        self._do(self._coordinator.submit(requests))
        run_tokens = {True: 0, False: 0}
        while True:
            waiting = [pair for pair, messages in self._links.items() if messages]
            ready = [name for name, node in self.nodes.items() if node.has_work]
            if not waiting and not ready:
                break
            # Iterations are drawn less often than messages, so that batches are of several requests.
            if ready and (not waiting or self._draw.random() < 0.2):
                name = self._draw.choice(ready)
                node = self.nodes[name]
                for out in node.run_batch(run_tokens):
                    payload = None if out.payload is None else bytes(out.payload)
                    self._links.setdefault((name, out.peer or COORDINATOR), deque()).append((out.message, payload))
                node.ended()
            else:
                src, dst = self._draw.choice(waiting)
                message, payload = self._links[src, dst].popleft()
                if isinstance(message, Sampled):
                    self._do(self._coordinator.sampled(message.tokens))
                else:
                    self.nodes[dst].accept(*self._change(dst, message, payload))
        assert self._coordinator.num_in_flight == self._coordinator.num_waiting == 0, "some requests did not end"
        outputs = [Output(request.number, request.prompt, self.outputs[request.number]) for request in requests]
        assert [len(output.tokens) for output in outputs] == [request.max_tokens for request in requests]
        return first_differences(outputs, num_layers=self._model.num_layers, vocab_size=self._model.vocab_size)

    def _do(self, actions: Actions) -> None:
        for name, outgoing in self._coordinator.messages(actions).items():
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
