"""Measure the coordinator's own time per message, per token and per request, on its own sockets."""

from __future__ import annotations

import statistics
import time

from helixbench.profiler.cluster import Coordinator as CoordinatorCost
from helixbench.reference_server.coordinator.engine import Engine
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.keys import ClusterKey
from helixbench.reference_server.wire.messages import Sampled
from helixbench.reference_server.wire.transport import Transport, reply
from helixbench.solver.problem.plan import Hop
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.requests import Request, TokenEvent
from helixbench.solver.scheduling.router import Router

_NODE = "null"
_ROUNDS = 150
_BATCHES = (1, 32)
_PROMPT_TOKENS = 64
_PAUSE_S = 0.002  # between steps: what is wanted is the time of a step, not of one waiting for a container's CPU quota
_WAIT_MS = 10_000


def measure_coordinator(key: ClusterKey) -> CoordinatorCost:
    """Time per message, per token and per request: medians of the engine's own step with a node that answers at once.

    The node's time is not counted.
    """
    small, large = (_step_s(key, batch=batch, max_tokens=10 * _ROUNDS) for batch in _BATCHES)
    token_s = max(0.0, large - small) / (_BATCHES[1] - _BATCHES[0])
    ending = _step_s(key, batch=_BATCHES[1], max_tokens=1)
    return CoordinatorCost(
        message_s=max(0.0, small - token_s), token_s=token_s, request_s=max(0.0, ending - large) / _BATCHES[1]
    )


def _step_s(key: ClusterKey, *, batch: int, max_tokens: int) -> float:
    """Median seconds of one engine step on a message of ``batch`` tokens."""
    transport = Transport(key)
    router, address = transport.listen("127.0.0.1:0")
    agents = Agents({_NODE: address}, key)
    hops = (Hop(_NODE, 0, 1),)
    coordinator = Coordinator(Router([(hops, 1.0)]), kv_capacity_tokens={_NODE: 1 << 40})
    engine = Engine(agents, coordinator, (hops,))
    numbers = iter(range(1 << 30))

    def new(count: int) -> list[Request]:
        return [
            Request(number=next(numbers), prompt=(0,) * _PROMPT_TOKENS, max_tokens=max_tokens) for _ in range(count)
        ]

    ended = 0

    def refill(events: list[TokenEvent]) -> list[Request]:
        nonlocal ended
        ended = sum(1 for event in events if event.reason)
        return new(ended)

    try:
        running = new(batch)
        engine.submit(running)
        numbers_in_flight = [request.number for request in running]
        times = []
        for _ in range(_ROUNDS):
            identity, *_ = router.recv_multipart()
            reply(router, identity, Sampled(tuple((number, 0) for number in numbers_in_flight)))
            time.sleep(_PAUSE_S)
            begin = time.perf_counter()
            engine.step(_WAIT_MS, on_events=refill)
            times.append(time.perf_counter() - begin)
            if ended:
                numbers_in_flight = [number + batch for number in numbers_in_flight]
        return statistics.median(times)
    finally:
        agents.close()
        transport.close()
