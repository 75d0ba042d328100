"""The requests of a simulated run, and what becomes of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import msgspec

from helixbench.reference_server.run_log import RequestRecord, TokenCount
from helixbench.reference_server.simulation.arrivals import Arrivals, TracedRequest, draw_times
from helixbench.solver.problem.workload import Workload, draw_lengths
from helixbench.solver.scheduling.coordinator import Request, TokenEvent

BACKLOG = 256
"""Requests without end that wait from the start are made so many at a time; admission looks at the first only."""

NUM_INTERVALS = 60  # of the timeline, over the whole run


class _Running(msgspec.Struct):
    arrival_s: float
    prompt_tokens: int
    admitted_s: float = 0.0
    first_token_s: float | None = None
    output_tokens: int = 0


class Load:
    """Makes requests as the arrivals say, and keeps count of every token.

    Args:
        arrivals: when requests come.
        workload: how long they are; for a replay the trace says it.
        trace: of a replay.
        limit: requests in all; ``None`` for no end.
        seed: of lengths and times.
    """

    def __init__(
        self,
        arrivals: Arrivals,
        workload: Workload,
        *,
        trace: Sequence[TracedRequest] = (),
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self.arrivals = arrivals
        self._limit = limit
        self._lengths = draw_lengths(workload, random.Random(seed))
        self._timed: Iterator[tuple[float, int, int]] = iter(())
        if arrivals.kind == "replay":
            self._timed = ((request.arrival_s, request.prompt_tokens, request.output_tokens) for request in trace)
        elif arrivals.rate_per_s is not None:
            times = draw_times(arrivals, random.Random(f"arrivals {seed}"))
            self._timed = ((at_s, *lengths) for at_s, lengths in zip(times, self._lengths, strict=False))
        self._prompts: dict[int, tuple[int, ...]] = {}  # length -> a prompt of it; what is in it does not matter
        self._running: dict[int, _Running] = {}  # request -> its times
        self._numbers = itertools.count()
        self._is_trace_over = False
        self.num_made = 0
        self.finished: list[RequestRecord] = []
        self.in_flight = self.peak_in_flight = 0
        self.counts: list[tuple[float, int, int]] = []  # (time, prompt tokens, output tokens) of each message
        self.prompt_tokens = self.output_tokens = 0

    @property
    def is_over(self) -> bool:
        """Whether every request has come and has ended; never where more can come at any time."""
        return self._has_all_come and len(self.finished) == self.num_made

    @property
    def _has_all_come(self) -> bool:
        return self._is_trace_over or (self._limit is not None and self.num_made >= self._limit)

    def new_requests(self, count: int, now_s: float) -> list[Request]:
        """At most that many, arriving now, with lengths drawn from the workload."""
        if self._limit is not None:
            count = min(count, self._limit - self.num_made)
        return [self._make(*next(self._lengths), now_s) for _ in range(count)]

    def next_arrival(self) -> tuple[float, Request] | None:
        """When the next request comes that comes by itself, and which; ``None`` where none does."""
        if self._has_all_come:
            return None
        timed = next(self._timed, None)
        if timed is None:
            self._is_trace_over = self.arrivals.kind == "replay"
            return None
        at_s, prompt_tokens, output_tokens = timed
        return at_s, self._make(prompt_tokens, output_tokens, at_s)

    def following(self, num_ended: int, num_waiting: int, now_s: float) -> list[Request]:
        """What comes in the moment in which so many have ended and so many wait to be admitted."""
        if self.arrivals.kind == "closed loop":
            return self.new_requests(num_ended, now_s)
        if self.arrivals.kind == "offline" and num_waiting < BACKLOG:
            return self.new_requests(BACKLOG, 0.0)
        return []

    def admitted(self, request: int, now_s: float) -> None:
        """The coordinator let it in."""
        self._running[request].admitted_s = now_s
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)

    def record(self, events: Sequence[TokenEvent], now_s: float) -> int:
        """Count what happened now; returns how many requests ended."""
        prompts = ended = 0
        for event in events:
            running = self._running[event.request]
            if running.first_token_s is None:
                running.first_token_s = now_s
                prompts += running.prompt_tokens
            running.output_tokens += 1
            if event.reason:
                assert event.pipeline is not None, "nothing is aborted here"
                ended += 1
                del self._running[event.request]
                self.finished.append(
                    RequestRecord(
                        arrival_s=running.arrival_s,
                        admitted_s=running.admitted_s,
                        first_token_s=running.first_token_s,
                        finish_s=now_s,
                        prompt_tokens=running.prompt_tokens,
                        output_tokens=running.output_tokens,
                        pipeline=event.pipeline,
                    )
                )
        self.in_flight -= ended
        self.prompt_tokens += prompts
        self.output_tokens += len(events)
        self.counts.append((now_s, prompts, len(events)))
        return ended

    def timeline(self, until_s: float) -> tuple[TokenCount, ...]:
        """Tokens in equal intervals of the run."""
        width_s = until_s / NUM_INTERVALS
        prompts, outputs = [0] * NUM_INTERVALS, [0] * NUM_INTERVALS
        for at_s, prompt, output in self.counts:
            if at_s < until_s:
                index = min(int(at_s / width_s), NUM_INTERVALS - 1)
                prompts[index] += prompt
                outputs[index] += output
        return tuple(TokenCount((i + 1) * width_s, prompts[i], outputs[i]) for i in range(NUM_INTERVALS))

    def _make(self, prompt_tokens: int, output_tokens: int, at_s: float) -> Request:
        number = next(self._numbers)
        self.num_made += 1
        prompt = self._prompts.get(prompt_tokens)
        if prompt is None:
            prompt = self._prompts[prompt_tokens] = (0,) * prompt_tokens
        self._running[number] = _Running(at_s, prompt_tokens)
        return Request(number=number, prompt=prompt, max_tokens=output_tokens)
