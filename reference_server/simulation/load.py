"""The requests of a simulated run: when they arrive, how long they are, and when each of their tokens came."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import msgspec

from helixbench.reference_server.run_log import RequestRecord, TokenCount, token_counts
from helixbench.solver.problem.arrivals import Arrivals, timed_requests
from helixbench.solver.problem.traces import TracedRequest
from helixbench.solver.problem.workload import Workload, draw_lengths
from helixbench.solver.scheduling.requests import InFlight, Request

BACKLOG = 256
"""Requests made at a time where all are there from the start; admission looks at the first only."""


class _Times(msgspec.Struct):
    arrival_s: float
    admitted_s: float = 0.0
    first_token_s: float = 0.0


class Load:
    """Makes requests as the arrivals say, and records what becomes of them.

    Args:
        arrivals: when requests arrive.
        workload: how long they are; for a replay the trace says it.
        trace: of a replay.
        concurrency: requests of a closed loop.
        limit: requests in all; ``None`` for no end.
        seed: of lengths and times.
    """

    def __init__(
        self,
        arrivals: Arrivals,
        workload: Workload,
        *,
        trace: Sequence[TracedRequest] = (),
        concurrency: int = 0,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self._kind, self._concurrency, self._limit = arrivals.kind, concurrency, limit
        self._lengths = draw_lengths(workload, random.Random(seed))  # of requests that follow others
        self._timed = timed_requests(arrivals, workload, trace=trace, seed=seed)
        self._prompts: dict[int, tuple[int, ...]] = {}  # length -> a prompt of it; what is in it does not matter
        self._times: dict[int, _Times] = {}  # request that has not ended -> its times
        self._numbers = itertools.count()
        self._is_trace_over = False
        self.num_made = 0
        self.finished: list[RequestRecord] = []
        self.in_flight = self.peak_in_flight = 0
        self.counts: list[tuple[float, int, int]] = []  # (time, prompt tokens, output tokens) of each message
        self.prompt_tokens = self.output_tokens = 0

    @property
    def is_over(self) -> bool:
        """Whether every request has arrived and ended; never where more can arrive at any time."""
        return self._has_all_come and len(self.finished) == self.num_made

    @property
    def _has_all_come(self) -> bool:
        return self._is_trace_over or (self._limit is not None and self.num_made >= self._limit)

    def next_arrival(self) -> tuple[float, Request] | None:
        """Time and request of the next arrival that does not depend on others; ``None`` where there is none."""
        if self._has_all_come:
            return None
        timed = next(self._timed, None)
        if timed is None:
            self._is_trace_over = self._kind == "replay"
            return None
        at_s, prompt_tokens, output_tokens = timed
        return at_s, self._make(prompt_tokens, output_tokens, at_s)

    def following(self, num_waiting: int, now_s: float) -> list[Request]:
        """Requests that arrive at this moment because others have ended or were admitted."""
        if self._kind == "closed loop":
            return self._make_all(self._concurrency - (self.num_made - len(self.finished)), now_s)
        if self._kind == "offline" and num_waiting < BACKLOG:
            return self._make_all(BACKLOG, 0.0)
        return []

    def admitted(self, requests: Sequence[InFlight], now_s: float) -> None:
        """These requests were admitted."""
        for state in requests:
            self._times[state.request.number].admitted_s = now_s
        self.in_flight += len(requests)
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)

    def answered(self, num_tokens: int, began: Sequence[InFlight], ended: Sequence[InFlight], now_s: float) -> None:
        """Count the tokens of a message; a prompt's count with its first output token."""
        for state in began:
            self._times[state.request.number].first_token_s = now_s
        for state in ended:
            times = self._times.pop(state.request.number)
            self.finished.append(
                RequestRecord(
                    arrival_s=times.arrival_s,
                    admitted_s=times.admitted_s,
                    first_token_s=times.first_token_s,
                    finish_s=now_s,
                    prompt_tokens=len(state.request.prompt),
                    output_tokens=state.num_output,
                    pipeline=state.pipeline,
                )
            )
        prompts = sum(len(state.request.prompt) for state in began)
        self.in_flight -= len(ended)
        self.prompt_tokens += prompts
        self.output_tokens += num_tokens
        self.counts.append((now_s, prompts, num_tokens))

    def timeline(self, until_s: float) -> tuple[TokenCount, ...]:
        """Tokens in equal intervals of the run."""
        return token_counts(self.counts, until_s)

    def _make_all(self, count: int, now_s: float) -> list[Request]:
        """At most that many, arriving now, with lengths drawn from the workload."""
        if self._limit is not None:
            count = min(count, self._limit - self.num_made)
        return [self._make(*next(self._lengths), now_s) for _ in range(count)]

    def _make(self, prompt_tokens: int, output_tokens: int, at_s: float) -> Request:
        number = next(self._numbers)
        self.num_made += 1
        prompt = self._prompts.setdefault(prompt_tokens, (0,) * prompt_tokens)
        self._times[number] = _Times(at_s)
        return Request(number=number, prompt=prompt, max_tokens=output_tokens)
