"""A placement under a closed loop: what it delivers while a fixed number of requests is in flight.

Batches are not averages. What leaves a node together arrives together, waits together and is batched together again, so
requests travel in groups whose number and sizes decide how often the fixed part of an iteration is paid. No formula in
averages alone gives these groups; simulating them does, with stage times from the cluster profile and none from the run
that is predicted.

With many requests in flight groups go on merging for a long time. So what is reported is the last of several windows in
a row, the first that agrees with the one before it.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.flow.pipelines import pipelines_of
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Expected, LayerRange, LinkFlow, Percentiles
from helixbench.solver.problem.workload import Workload, draw_lengths
from helixbench.solver.scheduling.requests import InFlight, Request
from helixbench.solver.scheduling.router import Router
from helixbench.solver.simulation.cluster import NodeSetup, SimulatedCluster

MIN_REQUESTS = 96
MIN_ROUNDS = 4
"""A window holds this many requests, or this many rounds of all that are in flight: the larger of the two."""

FEWEST_REQUESTS = 48
"""A window that is cut off counts if it holds this many requests, and a round of all that are in flight."""

TOKENS_PER_EVENT = 5
"""Tokens that cost about as much time as one event."""

SETTLED = 0.01
"""Two windows agree where their tokens/s differ by no more than this share."""

_EVENTS_A_TURN = 10_000  # between two looks at the work done
_BACKLOG = 32  # requests made at a time where some always wait; admission looks at the first only


class ClosedLoopResult(msgspec.Struct, frozen=True):
    """What is expected, whether two windows in a row agreed on it, after how many rounds and how much work.

    ``totals`` are the tokens/s of each start that it is the mean of, where there were several.
    """

    expected: Expected
    is_settled: bool
    rounds: float
    work: int
    totals: tuple[float, ...] = ()


def can_admit_longest(capacities: Capacities, placement: Mapping[str, LayerRange], flows: Sequence[LinkFlow]) -> bool:
    """Whether some pipeline admits the workload's longest request: those behind it would wait for ever."""
    need = capacities.mix.max_kv_tokens - 1
    return any(
        all(capacities.kv_slots(hop.node, placement[hop.node]) >= need for hop in hops)
        for hops, _ in pipelines_of(placement, flows)
    )


def simulate_closed_loop(
    capacities: Capacities,
    placement: Mapping[str, LayerRange],
    flows: Sequence[LinkFlow],
    concurrency: int | None,
    *,
    max_decode_batch: int | None = None,
    max_batch_tokens: int | None = None,
    min_requests: int = MIN_REQUESTS,
    min_rounds: int = MIN_ROUNDS,
    max_windows: int = 1,
    max_work: int = 1_000_000_000,
    seed: int = 0,
) -> ClosedLoopResult | None:
    """Throughput and latency in a closed loop; ``None`` where the work allowed was too little to tell.

    Args:
        capacities: of the cluster for the workload, whose lengths are drawn at random.
        placement: node -> layer range.
        flows: weights of the pipelines.
        concurrency: requests in flight; ``None`` for as many as admission lets into the KV caches.
        max_decode_batch: decoding sequences in an iteration at most; ``None`` for no such limit.
        max_batch_tokens: tokens in an iteration at most; ``None`` for what each node can do.
        min_requests: requests in a window at least.
        min_rounds: rounds of all that are in flight in a window at least.
        max_windows: windows at most, until two in a row agree.
        max_work: events at most, ``TOKENS_PER_EVENT`` output tokens counted as one.
        seed: of the draws.
    """
    loop = _ClosedLoop(
        capacities,
        placement,
        flows,
        concurrency,
        max_decode_batch=max_decode_batch,
        max_batch_tokens=max_batch_tokens,
        max_work=max_work,
        seed=seed,
    )
    return loop.run(min_requests=min_requests, min_rounds=min_rounds, max_windows=max_windows)


class _Clients:
    """Requests drawn from a workload: each that ends is followed by the next, or some always wait for room.

    Args:
        concurrency: requests in flight or waiting; ``None`` for as many as there is room for, and more that wait.
    """

    def __init__(self, workload: Workload, concurrency: int | None, seed: int) -> None:
        self._concurrency = concurrency
        self._lengths = draw_lengths(workload, random.Random(seed))
        self._numbers = itertools.count()
        self._prompts: dict[int, tuple[int, ...]] = {}  # length -> a prompt of it; its tokens do not matter
        self._began_s: dict[int, float] = {}  # request -> since when it waits for its first token
        self._first_token_s: dict[InFlight, float] = {}
        self.finished = self.outputs = self._sent = 0
        self.tokens: dict[int, int] = {}  # pipeline -> tokens of the requests that ended on it, prompts among them
        self._in_flight, self._counted_s, self._request_s = 0, 0.0, 0.0
        self.ttft_s: list[float] = []
        self.tpot_s: list[float] = []

    def following(self, num_waiting: int, now_s: float) -> list[Request]:
        """What the clients send now."""
        if self._concurrency is None:
            count = 0 if num_waiting else _BACKLOG
        else:
            count = self._concurrency + self.finished - self._sent
        self._sent += count
        requests = [self._make(*next(self._lengths)) for _ in range(count)]
        for request in requests:
            self._began_s[request.number] = now_s
        return requests

    def admitted(self, requests: Sequence[InFlight], now_s: float) -> None:
        """Of requests that always wait, latencies count from admission."""
        self._count(len(requests), now_s)
        if self._concurrency is None:
            for state in requests:
                self._began_s[state.request.number] = now_s

    def answered(self, num_tokens: int, began: Sequence[InFlight], ended: Sequence[InFlight], now_s: float) -> None:
        """Count tokens and requests, and take the times of those that ended."""
        self._count(-len(ended), now_s)
        self.outputs += num_tokens
        self.finished += len(ended)
        for state in began:
            self._first_token_s[state] = now_s
        for state in ended:
            first_s = self._first_token_s.pop(state)
            self.ttft_s.append(first_s - self._began_s.pop(state.request.number))
            tokens = len(state.request.prompt) + state.num_output
            self.tokens[state.pipeline] = self.tokens.get(state.pipeline, 0) + tokens
            if state.num_output > 1:
                self.tpot_s.append((now_s - first_s) / (state.num_output - 1))

    def request_s(self, now_s: float) -> float:
        """Seconds in flight so far, over all requests."""
        self._count(0, now_s)
        return self._request_s

    def _count(self, change: int, now_s: float) -> None:
        """So many more are in flight from now on."""
        self._request_s += self._in_flight * (now_s - self._counted_s)
        self._in_flight, self._counted_s = self._in_flight + change, now_s

    def _make(self, prompt_tokens: int, output_tokens: int) -> Request:
        prompt = self._prompts.setdefault(prompt_tokens, (0,) * prompt_tokens)
        return Request(number=next(self._numbers), prompt=prompt, max_tokens=output_tokens)


@dataclass(frozen=True)
class _Snapshot:
    """All counters at a moment."""

    at_s: float
    outputs: int
    request_s: float  # seconds in flight, over all requests
    nodes: Mapping[str, tuple[float, int, int]]  # node -> seconds in iterations, iterations, tokens decoded
    pipelines: Mapping[int, int]  # pipeline -> tokens of the requests that ended


class _ClosedLoop:
    def __init__(
        self,
        capacities: Capacities,
        placement: Mapping[str, LayerRange],
        flows: Sequence[LinkFlow],
        concurrency: int | None,
        *,
        max_decode_batch: int | None,
        max_batch_tokens: int | None,
        max_work: int,
        seed: int,
    ) -> None:
        self._concurrency, self._max_work = concurrency, max_work
        setups = {}
        for name, held in placement.items():
            most = capacities.max_batch_tokens(name, held)
            most = min(most, max_batch_tokens or most)
            setups[name] = NodeSetup(held, capacities.stage_cost(name, held), most, capacities.kv_slots(name, held))
        self._clients = _Clients(capacities.workload, concurrency, seed)
        self._router = Router(pipelines_of(placement, flows))
        self._cluster = SimulatedCluster(
            capacities.profile,
            setups,
            self._router,
            self._clients,
            max_decode_batch=max_decode_batch,
            max_concurrency=concurrency,
            seed=seed,
            on_answer=self._stop_when_finished,
        )
        costs = [node.cost for node in (capacities.nodes[name] for name in placement) if node.cost is not None]
        self._error = max((cost.held_out_error_median for cost in costs), default=0.0)
        self._tokens_per_output = capacities.mix.tokens_per_output
        self._finish_at = 0  # requests that end before the clock stops

    def run(self, *, min_requests: int, min_rounds: int, max_windows: int) -> ClosedLoopResult | None:
        """Fill the cluster, let every one of the first requests finish, then measure windows."""
        self._cluster.start()
        clients, in_flight = self._clients, self._cluster.coordinator.num_in_flight
        size = max(min_rounds * in_flight, min_requests)
        self._advance(in_flight)
        last: Expected | None = None
        is_settled = False
        for _ in range(max_windows):
            begin, before = self._snapshot(), clients.finished
            clients.ttft_s, clients.tpot_s = [], []
            is_whole = self._advance(size)
            if not is_whole and (last is not None or clients.finished - before < max(in_flight, FEWEST_REQUESTS)):
                break
            total_before = last.total_tokens_per_s if last else -1.0
            last = self._expected(begin, self._snapshot())
            is_settled = is_whole and abs(last.total_tokens_per_s - total_before) <= SETTLED * total_before
            if is_settled or not is_whole:
                break
        if last is None:
            return None
        return ClosedLoopResult(last, is_settled, clients.finished / in_flight, self._work)

    def _expected(self, begin: _Snapshot, end: _Snapshot) -> Expected:
        in_flight = (end.request_s - begin.request_s) / (end.at_s - begin.at_s)
        seconds = end.at_s - begin.at_s
        outputs_per_s = (end.outputs - begin.outputs) / seconds
        # Not the prompts that were counted: they come in lumps, and in a window of 96 requests were 5 to 7 % too many.
        total = outputs_per_s * self._tokens_per_output
        busy, batches = {}, {}
        for name, (busy_s, iterations, decoded) in end.nodes.items():
            before = begin.nodes[name]
            busy[name] = min(1.0, (busy_s - before[0]) / seconds)
            batches[name] = (decoded - before[2]) / max(1, iterations - before[1])
        node_share, link_share = self._shares(begin, end)
        return Expected(
            concurrency=round(in_flight) if self._concurrency is None else self._concurrency,
            total_tokens_per_s=total,
            output_tokens_per_s=outputs_per_s,
            ttft_s=_mean(self._clients.ttft_s),
            tpot_s=_mean(self._clients.tpot_s),
            ttft=_percentiles(self._clients.ttft_s),
            tpot=_percentiles(self._clients.tpot_s),
            low_total_tokens_per_s=total / (1 + self._error) / (1 + SETTLED),
            high_total_tokens_per_s=total / max(1e-6, 1 - self._error) * (1 + SETTLED),
            in_flight=in_flight,
            node_busy=busy,
            node_batch_tokens=batches,
            node_share=node_share,
            link_share=link_share,
        )

    def _shares(self, begin: _Snapshot, end: _Snapshot) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Node -> share of the tokens of requests that ended meanwhile; source -> destination -> that of the link."""
        tokens = {number: count - begin.pipelines.get(number, 0) for number, count in end.pipelines.items()}
        total = max(1, sum(tokens.values()))
        nodes = dict.fromkeys(self._cluster.nodes, 0.0)
        links: dict[str, dict[str, float]] = {}
        for number, count in tokens.items():
            path = [hop.node for hop in self._router.pipelines[number]]
            for name in path:
                nodes[name] += count / total
            for src, dst in itertools.pairwise((COORDINATOR, *path, COORDINATOR)):
                onward = links.setdefault(src, {})
                onward[dst] = onward.get(dst, 0.0) + count / total
        return nodes, links

    def _snapshot(self) -> _Snapshot:
        nodes = {name: (node.busy_s, node.iterations, node.decode_tokens) for name, node in self._cluster.nodes.items()}
        now_s = self._cluster.loop.now_s
        clients = self._clients
        return _Snapshot(now_s, clients.outputs, clients.request_s(now_s), nodes, dict(clients.tokens))

    def _advance(self, num_requests: int) -> bool:
        """Go on until this many more have ended; ``False`` where the work was used up before."""
        self._finish_at = self._clients.finished + num_requests
        while self._work < self._max_work:
            if not self._cluster.loop.run(_EVENTS_A_TURN):
                in_flight = self._cluster.coordinator.num_in_flight
                assert self._clients.finished >= self._finish_at, f"nothing happens any more with {in_flight} in flight"
                return True
        return False

    def _stop_when_finished(self) -> None:
        if self._clients.finished >= self._finish_at:
            self._cluster.loop.stop()

    @property
    def _work(self) -> int:
        """Work so far: events, and a number of tokens counted as one."""
        return self._cluster.loop.num_events + self._clients.outputs // TOKENS_PER_EVENT


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _percentiles(values: Sequence[float]) -> Percentiles | None:
    return Percentiles(*np.percentile(values, (50, 90, 99)).tolist()) if values else None
