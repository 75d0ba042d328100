"""The requests that a benchmark sends, when they are due, and what became of each."""

from __future__ import annotations

import array
import random
from collections.abc import Callable, Sequence

import msgspec

from helixbench.profiler.model.hash_reference import Output
from helixbench.reference_server.coordinator.history import HistoryWriter
from helixbench.reference_server.run_log import RequestRecord
from helixbench.solver.problem.arrivals import Arrivals, timed_requests
from helixbench.solver.problem.traces import TracedRequest
from helixbench.solver.problem.workload import Workload, draw_lengths
from helixbench.solver.scheduling.requests import Request, TokenEvent

CLOSED_LOOP = Arrivals(kind="closed loop")


class BenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What load to make.

    Of a closed loop, ``num_requests`` finish inside the window, or it lasts ``duration_s``. Its warm-up ends when as
    many requests as are in flight have finished, but not before ``warmup_s``. The window of an open loop begins at
    ``warmup_s`` and ends after ``duration_s``, or when all of ``num_requests`` or of the ``trace`` have ended.

    Attributes:
        concurrency: requests in flight; of an open loop the most, ``None`` for as many as the KV caches hold.
        arrivals: a closed or an open loop.
        trace: of a replay.
        keep_outputs: tokens of finished requests stay in memory, to be checked.
    """

    workload: Workload
    concurrency: int | None
    seed: int
    vocab_size: int
    arrivals: Arrivals = CLOSED_LOOP
    trace: tuple[TracedRequest, ...] = ()
    num_requests: int | None = None
    duration_s: float | None = None
    warmup_s: float = 0.0
    keep_outputs: bool = False


class _Running(msgspec.Struct):
    prompt_tokens: int
    arrival_s: float
    first_token_s: float | None = None
    output_tokens: int = 0
    prompt: tuple[int, ...] = ()  # where outputs are kept, as is ``tokens``
    tokens: list[int] = []


class BenchLoad:
    """The requests of one run.

    In a closed loop a request that finished is followed by the next; in an open loop requests are due at times of
    their own, and what a client waits counts from there, however late it was sent.
    """

    def __init__(self, config: BenchConfig, clock: Callable[[], float], history: HistoryWriter | None = None) -> None:
        self._config = config
        self._clock = clock
        # drawn as the simulator does: one seed, the same requests
        self._lengths = draw_lengths(config.workload, random.Random(config.seed))
        self._timed = timed_requests(config.arrivals, config.workload, trace=config.trace, seed=config.seed)
        self._tokens = random.Random(f"tokens {config.seed}")
        self._running: dict[int, _Running] = {}  # request -> its times
        self._num_made = 0
        self._history = history
        self.num_failed = 0  # requests that ended with an error
        self.peak_in_flight = 0  # sent and not ended
        self.finished: list[RequestRecord] = []
        self.outputs: list[Output] = []  # of the finished ones, where they are kept
        self.counts: list[tuple[float, int, int]] = []  # (time, prompt tokens, output tokens) of each event
        self._coming = self._next_timed()  # made ahead: a prompt takes time to make

    @property
    def next_due_s(self) -> float | None:
        """When the next request of an open loop is due; ``None`` where none is."""
        return None if self._coming is None else self._coming[0]

    @property
    def is_over(self) -> bool:
        """Whether every request of an open loop has come and ended."""
        return self._config.arrivals.is_open_loop and self._coming is None and not self._running

    def new_requests(self, count: int, now: float) -> list[Request]:
        """That many requests, arriving at ``now``."""
        return [self._send(self._made(*next(self._lengths)), now) for _ in range(count)]

    def due(self, now: float) -> list[Request]:
        """The requests of an open loop that are due by ``now`` and were not sent."""
        requests = []
        while self._coming is not None and self._coming[0] <= now:
            at_s, request = self._coming
            requests.append(self._send(request, at_s))
            self._coming = self._next_timed()
        return requests

    def record(self, events: Sequence[TokenEvent]) -> list[Request]:
        """Note what happened, now; in a closed loop every request that finished is followed by a new one."""
        now = self._clock()
        num_finished = len(self.finished)
        for event in events:
            if self._history is not None:
                self._history.heard(event, now)
            if event.token is None:
                del self._running[event.request]
                self.num_failed += 1
                continue
            running = self._running[event.request]
            prompt_tokens = 0
            if running.first_token_s is None:
                running.first_token_s = now
                prompt_tokens = running.prompt_tokens
            running.output_tokens += 1
            self.counts.append((now, prompt_tokens, 1))
            if self._config.keep_outputs:
                running.tokens.append(event.token)
            if event.reason:
                self._finish(event, running, now)
        if self._config.arrivals.is_open_loop:
            return []
        return self.new_requests(len(self.finished) - num_finished, now)

    def _finish(self, event: TokenEvent, running: _Running, now: float) -> None:
        assert event.pipeline is not None, "nothing is aborted here"
        assert running.first_token_s is not None
        del self._running[event.request]
        if self._config.keep_outputs:
            prompt, tokens = array.array("i", running.prompt), array.array("i", running.tokens)
            self.outputs.append(Output(event.request, prompt, tokens))
        self.finished.append(
            RequestRecord(
                arrival_s=running.arrival_s,
                first_token_s=running.first_token_s,
                finish_s=now,
                prompt_tokens=running.prompt_tokens,
                output_tokens=running.output_tokens,
                pipeline=event.pipeline,
            )
        )

    def _next_timed(self) -> tuple[float, Request] | None:
        if self._num_made == self._config.num_requests:
            return None
        timed = next(self._timed, None)
        return None if timed is None else (timed[0], self._made(*timed[1:]))

    def _made(self, prompt_tokens: int, output_tokens: int) -> Request:
        prompt = tuple(self._tokens.randrange(self._config.vocab_size) for _ in range(prompt_tokens))
        self._num_made += 1
        return Request(number=self._num_made - 1, prompt=prompt, max_tokens=output_tokens)

    def _send(self, request: Request, arrival_s: float) -> Request:
        kept = request.prompt if self._config.keep_outputs else ()
        self._running[request.number] = _Running(len(request.prompt), arrival_s, prompt=kept)
        self.peak_in_flight = max(self.peak_in_flight, len(self._running))
        if self._history is not None:
            self._history.sent(request, self._clock())
        return request
