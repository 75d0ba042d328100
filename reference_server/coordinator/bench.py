"""Closed-loop load on an engine: a fixed number of requests in flight, a warm-up, and a steady window that counts."""

from __future__ import annotations

import array
import random
import time
from collections.abc import Callable
from typing import TypeAlias

import msgspec

from helixbench.errors import MeasurementError
from helixbench.profiler.model.hash_reference import Output
from helixbench.reference_server.coordinator.adaptation import recorded
from helixbench.reference_server.coordinator.effects import with_effects
from helixbench.reference_server.coordinator.engine import Engine
from helixbench.reference_server.coordinator.history import HistoryWriter
from helixbench.reference_server.coordinator.live_events import LiveEvents
from helixbench.reference_server.run_log import (
    AdaptationLog,
    LinkUse,
    NodePoint,
    NodeUse,
    RequestRecord,
    TokenCount,
    Window,
    node_points,
    token_counts,
)
from helixbench.reference_server.wire.messages import Counters, LinkCounters
from helixbench.solver.problem.workload import Workload, draw_lengths
from helixbench.solver.scheduling.requests import Request, TokenEvent

_COUNTERS_TIMEOUT_S = 60.0


class BenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What load to make.

    Either ``num_requests`` finish inside the window, or the window lasts ``duration_s``. The warm-up ends when as many
    requests as are in flight have finished, but not before ``warmup_s``. ``keep_outputs``: tokens of finished requests
    stay in memory, to be checked.
    """

    workload: Workload
    concurrency: int
    seed: int
    vocab_size: int
    num_requests: int | None = None
    duration_s: float | None = None
    warmup_s: float = 0.0
    keep_outputs: bool = False


class BenchResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; fields as in ``RunLog``. ``outputs[i]`` is that of ``requests[i]``, where they are kept."""

    window: Window
    prompt_tokens: int
    output_tokens: int
    requests: tuple[RequestRecord, ...]
    outputs: tuple[Output, ...]
    nodes: dict[str, NodeUse]
    links: tuple[LinkUse, ...]
    timeline: tuple[TokenCount, ...]
    node_timeline: dict[str, tuple[NodePoint, ...]]
    cut_short: str
    adaptation: AdaptationLog = AdaptationLog()
    failed_requests: int = 0


class _Running(msgspec.Struct):
    prompt_tokens: int
    arrival_s: float
    first_token_s: float | None = None
    output_tokens: int = 0
    prompt: tuple[int, ...] = ()  # where outputs are kept, as is ``tokens``
    tokens: list[int] = []


_Snapshot: TypeAlias = tuple[float, dict[str, Counters], dict[str, LinkCounters]]


class _Load:
    """The requests of a closed loop, and what became of them."""

    def __init__(self, config: BenchConfig, clock: Callable[[], float], history: HistoryWriter | None = None) -> None:
        self._config = config
        self._clock = clock
        # drawn as the simulator does: one seed, the same requests
        self._lengths = draw_lengths(config.workload, random.Random(config.seed))
        self._tokens = random.Random(f"tokens {config.seed}")
        self._running: dict[int, _Running] = {}  # request -> its times
        self._next_number = 0
        self._history = history
        self.num_failed = 0  # requests that ended with an error
        self.finished: list[RequestRecord] = []
        self.outputs: list[Output] = []  # of the finished ones, where they are kept
        self.counts: list[tuple[float, int, int]] = []  # (time, prompt tokens, output tokens) of each event

    def new_requests(self, count: int, now: float) -> list[Request]:
        """That many requests, arriving at ``now``."""
        requests = []
        for _ in range(count):
            prompt_tokens, output_tokens = next(self._lengths)
            prompt = tuple(self._tokens.randrange(self._config.vocab_size) for _ in range(prompt_tokens))
            requests.append(Request(number=self._next_number, prompt=prompt, max_tokens=output_tokens))
            kept = prompt if self._config.keep_outputs else ()
            self._running[self._next_number] = _Running(prompt_tokens, now, prompt=kept)
            self._next_number += 1
            if self._history is not None:
                self._history.sent(requests[-1], now)
        return requests

    def record(self, events: list[TokenEvent]) -> list[Request]:
        """Note what happened, now; every request that finished is followed by a new one."""
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
                assert event.pipeline is not None, "nothing is aborted here"
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
        return self.new_requests(len(self.finished) - num_finished, now)


def run_bench(
    engine: Engine,
    config: BenchConfig,
    *,
    on_progress: Callable[[str, float, float], None] = lambda _phase, _done, _total: None,
    is_interrupted: Callable[[], bool] = lambda: False,
    events: LiveEvents | None = None,
    history: HistoryWriter | None = None,
) -> BenchResult:
    """Run the load and measure. All times are the devices': the clock is divided by the testbed's time scale.

    Args:
        engine: a served plan without other requests.
        config: the load.
        on_progress: told (phase, done, total) of the warm-up and the window, in seconds or requests.
        is_interrupted: asked now and then; when true the window ends at once and what was measured is kept.
        events: made to happen at their times since the load began.
        history: told what each client sends and hears.

    Raises:
        MeasurementError: an agent failed, or the run was interrupted before the window began.
    """
    started = time.perf_counter()

    def clock() -> float:
        return (time.perf_counter() - started) / engine.timing.time_scale

    load = _Load(config, clock, history)

    def step() -> None:
        if events is not None:
            events.tick(clock())
        engine.step(50, on_events=load.record)

    def is_over() -> str:
        """Why the run ends before its time; empty while it does not."""
        if load.num_failed:
            return f"{load.num_failed} requests failed"
        return "interrupted" if is_interrupted() else ""

    engine.submit(load.new_requests(config.concurrency, clock()))
    while not is_over() and (len(load.finished) < config.concurrency or clock() < config.warmup_s):
        step()
        on_progress("warming up", min(len(load.finished), config.concurrency), config.concurrency)
    if cut_short := is_over():
        raise MeasurementError(f"{cut_short} during the warm-up: nothing was measured")
    begin = _snapshot(engine, step, clock)
    warm_requests = len(load.finished)
    while not is_over() and not _is_over(config, clock() - begin[0], len(load.finished) - warm_requests):
        step()
        if config.duration_s is not None:
            on_progress("measuring", min(clock() - begin[0], config.duration_s), config.duration_s)
        elif config.num_requests is not None:
            on_progress("measuring", min(len(load.finished) - warm_requests, config.num_requests), config.num_requests)
    end = _snapshot(engine, step, clock)
    happened = () if events is None else tuple(events.happened)
    log = [] if engine.adaptation is None else engine.adaptation.log
    return _result(
        load,
        begin,
        end,
        adaptation=msgspec.structs.replace(
            recorded(log, since_s=started, time_scale=engine.timing.time_scale), events=happened
        ),
        cut_short=is_over(),
    )


def _is_over(config: BenchConfig, elapsed_s: float, num_finished: int) -> bool:
    if config.num_requests is not None:
        return num_finished >= config.num_requests
    assert config.duration_s is not None
    return elapsed_s >= config.duration_s


def _snapshot(engine: Engine, step: Callable[[], None], clock: Callable[[], float]) -> _Snapshot:
    """Counters of all nodes and of the coordinator's own links, and when; the load goes on meanwhile."""
    engine.ask_counters()
    asked_s = clock()
    sent = dict(engine.sent)
    while (counters := engine.counters()) is None:
        step()
        if clock() - asked_s > _COUNTERS_TIMEOUT_S:
            raise MeasurementError(f"a node did not say what it did within {_COUNTERS_TIMEOUT_S:.0f} s")
    return asked_s, counters, sent


def _result(load: _Load, begin: _Snapshot, end: _Snapshot, *, adaptation: AdaptationLog, cut_short: str) -> BenchResult:
    window = Window(begin[0], end[0])
    inside = [(p, o) for at, p, o in load.counts if window.start_s <= at < window.end_s]
    return BenchResult(
        window=window,
        prompt_tokens=sum(p for p, _ in inside),
        output_tokens=sum(o for _, o in inside),
        requests=tuple(load.finished),
        outputs=tuple(load.outputs),
        nodes={node: _node_use(begin[1].get(node), counters) for node, counters in end[1].items()},
        links=tuple(_link_uses(begin, end)),
        timeline=token_counts(load.counts, window.end_s),
        node_timeline={node: tuple(node_points(c.history, read_s=window.end_s)) for node, c in end[1].items()},
        cut_short=cut_short,
        adaptation=with_effects(adaptation, load.counts, load.finished, window.end_s),
        failed_requests=load.num_failed,
    )


def _node_use(begin: Counters | None, end: Counters) -> NodeUse:
    if begin is None or end.iterations < begin.iterations:  # it was loaded again meanwhile: its counts began again
        begin = msgspec.structs.replace(
            end, busy_s=0.0, iterations=0, prefill_tokens=0, decode_tokens=0, late_iterations=0, release_error_s=0.0
        )
    return NodeUse(
        busy_s=end.busy_s - begin.busy_s,
        iterations=end.iterations - begin.iterations,
        prefill_tokens=end.prefill_tokens - begin.prefill_tokens,
        decode_tokens=end.decode_tokens - begin.decode_tokens,
        kv_peak_tokens=end.kv_peak_tokens,
        kv_capacity_tokens=end.kv_capacity_tokens,
        late_iterations=end.late_iterations - begin.late_iterations,
        release_error_s=end.release_error_s - begin.release_error_s,
    )


def _link_uses(begin: _Snapshot, end: _Snapshot) -> list[LinkUse]:
    uses = [_link_use("coordinator", node, begin[2].get(node), sent) for node, sent in end[2].items()]
    for node, counters in end[1].items():
        before = begin[1][node].sent if node in begin[1] else {}
        uses += [_link_use(node, peer, before.get(peer), sent) for peer, sent in counters.sent.items()]
    return uses


def _link_use(src: str, dst: str, begin: LinkCounters | None, end: LinkCounters) -> LinkUse:
    if begin is None or end.messages < begin.messages:  # the sender was loaded again meanwhile
        begin = LinkCounters()
    return LinkUse(
        src=src,
        dst=dst,
        payload_bytes=end.payload_bytes - begin.payload_bytes,
        messages=end.messages - begin.messages,
        tokens=end.tokens - begin.tokens,
    )
