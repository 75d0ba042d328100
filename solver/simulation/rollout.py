"""What a plan will deliver, by rolling it forward: requests in a closed loop, iteration by iteration.

Batches are not means. What leaves a node together arrives together, waits together and is batched together again, so
requests travel in groups whose number and sizes decide how often the fixed part of an iteration is paid. No formula in
means alone gives these groups; following them does, with stage times from the cluster profile and none from the run
that is predicted.

Groups merge for a long time where many requests are in flight. So what is reported is the last of several windows in a
row, the first that agrees with the one before it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from helixbench.profiler.cluster import COORDINATOR as COORDINATOR_NAME
from helixbench.solver.flow.pipelines import pipelines_of
from helixbench.solver.problem.capacity import TABLE_KV_SHARE, Capacities
from helixbench.solver.problem.plan import Expected, LayerRange, LinkFlow
from helixbench.solver.problem.workload import draw_lengths
from helixbench.solver.simulation.event_loop import COORDINATOR, Kernel
from helixbench.solver.simulation.links import Wires
from helixbench.solver.simulation.rollout_node import Bunch, Parcel, Prompt, Request, RolloutNode
from helixbench.solver.simulation.stage_time import StageTimer, timing_of

MIN_REQUESTS = 96
MIN_ROUNDS = 4
"""A window holds this many requests, or so many rounds of all that are in flight: the larger of the two."""

FEWEST_REQUESTS = 48
"""A window that is cut off counts if it holds so many requests, and a round of all that are in flight."""

TOKENS_PER_EVENT = 5
"""A token that is counted takes about so much less time than an event."""

_EVENTS_A_TURN = 10_000  # between two looks at the work done

SETTLED = 0.01
"""Two windows agree where their tokens/s differ by no more than this share."""


def can_roll_out(capacities: Capacities, placement: Mapping[str, LayerRange], flows: Sequence[LinkFlow]) -> bool:
    """Whether some pipeline admits the workload's longest request: those behind it would wait for ever."""
    need = capacities.mix.max_kv_tokens - 1
    return any(
        all(_kv_slots(capacities, hop.node, placement[hop.node]) >= need for hop in hops)
        for hops, _ in pipelines_of(placement, flows)
    )


def _kv_slots(capacities: Capacities, name: str, held: LayerRange) -> int:
    """KV slots of a node that admission fills, as the simulator's and the server's does."""
    share = 1.0 if capacities.nodes[name].cost is not None else TABLE_KV_SHARE
    return int(capacities.kv_tokens(name, held) * share)


class RolledOut(msgspec.Struct, frozen=True):
    """What is expected, whether two windows in a row agreed on it, after how many rounds and how much work.

    ``totals`` are the tokens/s of each start that it is the mean of, where there were several.
    """

    expected: Expected
    is_settled: bool
    rounds: float
    work: int
    totals: tuple[float, ...] = ()


def roll_out(
    capacities: Capacities,
    placement: Mapping[str, LayerRange],
    flows: Sequence[LinkFlow],
    concurrency: int | None,
    *,
    max_decode_batch: int | None = None,
    max_batch_tokens: int | None = None,
    min_requests: int = MIN_REQUESTS,
    max_windows: int = 1,
    max_work: int = 1_000_000_000,
    seed: int = 0,
) -> RolledOut | None:
    """Expected throughput and latency in a closed loop; ``None`` where the work allowed was not enough to tell.

    Args:
        capacities: of the cluster for the workload, whose lengths are drawn at random.
        placement: node -> layer range.
        flows: what routing follows.
        concurrency: requests in flight; ``None`` for as many as the KV caches hold (80 % of those of a node that has
            only a capacity table, as its meaning rests on that).
        max_decode_batch: decoding sequences in an iteration at most; ``None`` for no such limit.
        max_batch_tokens: tokens in an iteration at most; ``None`` for what each node can do.
        min_requests: that a window holds at least, beside ``MIN_ROUNDS``.
        max_windows: windows followed at most, until two in a row agree.
        max_work: it is cut off after so many events, ``TOKENS_PER_EVENT`` output tokens counted as one.
        seed: of the draws.
    """
    rollout = _Rollout(
        capacities,
        placement,
        flows,
        max_decode_batch=max_decode_batch,
        max_batch_tokens=max_batch_tokens,
        max_work=max_work,
        seed=seed,
    )
    return rollout.run(concurrency, min_requests=min_requests, max_windows=max_windows)


@dataclass(frozen=True)
class _Mark:
    """All that is counted, at a moment."""

    at_s: float
    outputs: int
    nodes: Mapping[str, tuple[float, int, int]]  # node -> seconds in iterations, iterations, tokens decoded


class _Rollout:
    def __init__(
        self,
        capacities: Capacities,
        placement: Mapping[str, LayerRange],
        flows: Sequence[LinkFlow],
        *,
        max_decode_batch: int | None,
        max_batch_tokens: int | None,
        max_work: int,
        seed: int,
    ) -> None:
        self._kernel = Kernel()
        self._max_work = max_work
        self._profile = capacities.profile
        self._wires = Wires(self._profile, self._kernel)
        weighted = pipelines_of(placement, flows)
        self._pipelines = [pipeline for pipeline, _ in weighted]
        total = sum(weight for _, weight in weighted)
        self._shares = [weight / total for _, weight in weighted]
        self._credits = [0.0] * len(weighted)  # pipeline -> requests that it is owed
        self._kv_free: dict[str, int] = {}  # node -> KV slots that no request holds
        self._nodes: dict[str, RolloutNode] = {}
        for name, held in placement.items():
            node = capacities.nodes[name]
            timing = timing_of(capacities, node, held)
            most = min(timing.max_batch_tokens, max_batch_tokens or timing.max_batch_tokens)
            self._nodes[name] = RolloutNode(
                name,
                dict(enumerate(self._pipelines)),
                self._kernel,
                is_last=held.end == self._profile.model.num_layers,
                timer=StageTimer(timing.cost, held, num_layers=self._profile.model.num_layers, seed=f"{seed} {name}"),
                max_tokens=most,
                max_decodes=most if max_decode_batch is None else max_decode_batch,
                send=self._send,
            )
            self._kv_free[name] = _kv_slots(capacities, name, held)
        costs = [node.cost for node in (capacities.nodes[name] for name in placement) if node.cost is not None]
        self._error = max((cost.held_out_error_median for cost in costs), default=None)
        self._bytes_per_token: dict[tuple[str, str], float] = {}
        self._limit: int | None = None
        self._tokens_per_output = capacities.mix.tokens_per_output
        self._lengths = draw_lengths(capacities.workload, random.Random(seed))
        self._next_lengths = next(self._lengths)
        self._has_room = True  # whether the next request may fit, as far as is known
        self._inbox: deque[Parcel] = deque()
        self._is_busy = False  # the coordinator is
        self._in_flight = self._finished = 0
        self._finish_at = 0  # requests that are to end before the clock stops
        self._outputs = 0  # tokens that came out so far
        self._ttft_s: list[float] = []
        self._tpot_s: list[float] = []

    def run(self, concurrency: int | None, *, min_requests: int, max_windows: int) -> RolledOut | None:
        """Fill the cluster, let every one of the first requests finish, then count over windows."""
        self._limit = concurrency
        first: dict[str, Parcel] = {}
        self._admit(first)
        self._send_all(first)
        started = self._in_flight
        size = max(MIN_ROUNDS * started, min_requests)
        self._advance(started)
        counted: Expected | None = None  # over the last window
        is_settled = False
        for _ in range(max_windows):
            begin, before = self._mark(), self._finished
            self._ttft_s, self._tpot_s = [], []
            is_whole = self._advance(size)
            if not is_whole and (counted is not None or self._finished - before < max(started, FEWEST_REQUESTS)):
                break
            last = counted.total_tokens_per_s if counted else -1.0
            counted = self._expected(begin, self._mark(), started, concurrency)
            is_settled = is_whole and abs(counted.total_tokens_per_s - last) <= SETTLED * last
            if is_settled or not is_whole:
                break
        if counted is None:
            return None
        return RolledOut(counted, is_settled, self._finished / started, self.work)

    def _expected(self, begin: _Mark, end: _Mark, started: int, concurrency: int | None) -> Expected:
        seconds = end.at_s - begin.at_s
        outputs_per_s = (end.outputs - begin.outputs) / seconds
        # Not the prompts that were counted: they come in lumps, and in a window of 96 requests were 5 to 7 % too many.
        total = outputs_per_s * self._tokens_per_output
        between = {
            name: (busy_s - before[0], iterations - before[1], decoded - before[2])
            for (name, (busy_s, iterations, decoded)), before in zip(
                end.nodes.items(), begin.nodes.values(), strict=True
            )
        }
        return Expected(
            concurrency=started if concurrency is None else concurrency,
            total_tokens_per_s=total,
            output_tokens_per_s=outputs_per_s,
            ttft_s=_median(self._ttft_s),
            tpot_s=_median(self._tpot_s),
            low_total_tokens_per_s=None if self._error is None else total / (1 + self._error),
            high_total_tokens_per_s=None if self._error is None else total / max(1e-6, 1 - self._error),
            in_flight=float(started),
            node_busy={name: min(1.0, busy_s / seconds) for name, (busy_s, _, _) in between.items()},
            node_batch_tokens={
                name: decoded / max(1, iterations) for name, (_, iterations, decoded) in between.items()
            },
        )

    def _mark(self) -> _Mark:
        nodes = {name: (node.busy_s, node.iterations, node.decoded) for name, node in self._nodes.items()}
        return _Mark(self._kernel.now_s, self._outputs, nodes)

    def _advance(self, num_requests: int) -> bool:
        """Go on until so many more have ended; ``False`` where it was cut off before."""
        self._finish_at = self._finished + num_requests
        while self.work < self._max_work:
            if not self._kernel.run(_EVENTS_A_TURN):
                if self._finished < self._finish_at:
                    raise AssertionError(f"nothing happens any more with {self._in_flight} requests in flight")
                return True
        return False

    @property
    def work(self) -> int:
        """What following took so far: events, and a number of tokens counted as one."""
        return self._kernel.num_events + self._outputs // TOKENS_PER_EVENT

    # --- the coordinator

    def _admit(self, starting: dict[str, Parcel]) -> None:
        """Let requests in while there is room, each on the pipeline that is owed the most (IWRR), onto ``starting``."""
        while self._has_room and (self._limit is None or self._in_flight < self._limit):
            request = Request(*self._next_lengths, -1, self._kernel.now_s)
            need = request.kv_tokens
            full = {name for name, free in self._kv_free.items() if free < need}
            fitting = [
                index
                for index, hops in enumerate(self._pipelines)
                if not full or not any(hop.node in full for hop in hops)
            ]
            if not fitting:
                self._has_room = False
                return
            for index, share in enumerate(self._shares):
                self._credits[index] += share
            chosen = max(fitting, key=lambda index: (self._credits[index], -index))
            self._credits[chosen] -= 1.0
            request.pipeline = chosen
            for hop in self._pipelines[chosen]:
                self._kv_free[hop.node] -= need
            self._in_flight += 1
            prompt = Prompt(request, 0, request.prompt_tokens, is_end=True)
            starting.setdefault(self._pipelines[chosen][0].node, Parcel()).prompts.append(prompt)
            self._next_lengths = next(self._lengths)

    def _receive(self, parcel: Parcel) -> None:
        self._inbox.append(parcel)
        if not self._is_busy:
            self._take()

    def _take(self) -> None:
        """The coordinator takes a message: counts, ends, and is done with it some time later."""
        parcel = self._inbox.popleft()
        num_tokens = parcel.num_requests
        ended: list[Request] = []
        again: dict[int, Bunch] = {}  # pipeline -> those of its requests that go on
        for bunch in parcel.bunches:
            again[bunch.pipeline] = self._next_tokens(bunch, ended)
        for prompt in parcel.prompts:
            request = prompt.request
            bunch = again.setdefault(request.pipeline, Bunch(request.pipeline, [], 0))
            self._next_token(request, bunch, ended)
        for request in ended:
            for hop in self._pipelines[request.pipeline]:
                self._kv_free[hop.node] += request.kv_tokens
            self._has_room = True
        times = self._profile.coordinator
        work_s = (times.message_s or 0.0) + num_tokens * (times.token_s or 0.0)
        work_s += len(ended) * (times.request_s or 0.0)
        self._is_busy = True
        work = (num_tokens, parcel.prompts, ended, again)
        self._kernel.at(self._kernel.now_s + work_s, COORDINATOR, self._done, work)

    def _next_tokens(self, bunch: Bunch, ended: list[Request]) -> Bunch:
        """The bunch one token further, without those that end with it."""
        going, context = bunch.requests, bunch.context
        has_ended = False
        for request in going:
            request.left -= 1
            if not request.left:
                has_ended = True
                ended.append(request)
                context -= request.context - 1
        if has_ended:
            going = [request for request in going if request.left]
        return Bunch(bunch.pipeline, going, context + len(going))

    def _next_token(self, request: Request, bunch: Bunch, ended: list[Request]) -> None:
        """A prompt's first token."""
        request.left -= 1
        if request.left:
            bunch.requests.append(request)
            bunch.context += request.context
        else:
            ended.append(request)

    def _done(self, work: tuple[int, list[Prompt], list[Request], dict[int, Bunch]]) -> None:
        """Tokens are out, requests may be let in, and the next tokens go on their way."""
        num_tokens, prompts, ended, again = work
        now_s = self._kernel.now_s
        self._outputs += num_tokens
        for prompt in prompts:
            prompt.request.first_token_s = now_s
        for request in ended:
            self._ttft_s.append(request.first_token_s - request.arrival_s)
            if request.output_tokens > 1:
                self._tpot_s.append((now_s - request.first_token_s) / (request.output_tokens - 1))
        self._finished += len(ended)
        self._in_flight -= len(ended)
        if self._finished >= self._finish_at:
            self._kernel.stop()
        sends: dict[str, Parcel] = {}
        for request in ended:
            hops = self._pipelines[request.pipeline]
            if len(hops) == 1:
                sends.setdefault(hops[0].node, Parcel()).closed.append(request)
        for bunch in again.values():
            if bunch.requests:
                sends.setdefault(self._pipelines[bunch.pipeline][0].node, Parcel()).bunches.append(bunch)
        self._admit(sends)
        self._send_all(sends)
        self._is_busy = False
        if self._inbox:
            self._take()

    # --- the wires

    def _send_all(self, parcels: Mapping[str, Parcel]) -> None:
        """One message to each first node: tokens that go on and prompts that begin go together."""
        for name, parcel in parcels.items():
            self._send(COORDINATOR_NAME, name, parcel.num_tokens, parcel)

    def _send(self, src: str, dst: str, tokens: int, parcel: Parcel) -> None:
        ends = (src, dst)
        per_token = self._bytes_per_token.get(ends)
        if per_token is None:
            per_token = self._bytes_per_token[ends] = self._profile.bytes_per_token(src, dst)
        deliver = self._receive if dst == COORDINATOR_NAME else self._nodes[dst].receive
        self._wires.send(src, dst, tokens * per_token, deliver, parcel)


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
