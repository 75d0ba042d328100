"""Load on an engine, closed or open loop: a warm-up, and a steady window that counts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeAlias

import msgspec

from helixbench.errors import MeasurementError
from helixbench.profiler.model.hash_reference import Output
from helixbench.reference_server.coordinator.adaptation import recorded
from helixbench.reference_server.coordinator.bench_load import BenchConfig, BenchLoad
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

_COUNTERS_TIMEOUT_S = 60.0
_PATIENCE_MS = 50  # of one turn


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
    peak_in_flight: int = 0


_Snapshot: TypeAlias = tuple[float, dict[str, Counters], dict[str, LinkCounters]]


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

    load = BenchLoad(config, clock, history)

    def step() -> None:
        if events is not None:
            events.tick(clock())
        if due := load.due(clock()):
            load.record(engine.submit(due))
        engine.step(_patience_ms(load, clock(), engine.timing.time_scale), on_events=load.record)

    def is_over() -> str:
        """Why the run ends before its time; empty while it does not."""
        if load.num_failed:
            return f"{load.num_failed} requests failed"
        return "interrupted" if is_interrupted() else ""

    if config.arrivals.is_open_loop:
        while not is_over() and clock() < config.warmup_s:
            step()
            on_progress("warming up", min(clock(), config.warmup_s), config.warmup_s)
    else:
        assert config.concurrency is not None, "a closed loop keeps so many in flight"
        engine.submit(load.new_requests(config.concurrency, clock()))
        while not is_over() and (len(load.finished) < config.concurrency or clock() < config.warmup_s):
            step()
            on_progress("warming up", min(len(load.finished), config.concurrency), config.concurrency)
    if cut_short := is_over():
        raise MeasurementError(f"{cut_short} during the warm-up: nothing was measured")
    begin = _snapshot(engine, step, clock)
    warm_requests = len(load.finished)
    while not is_over() and not _is_over(config, load, clock() - begin[0], len(load.finished) - warm_requests):
        step()
        if config.duration_s is not None:
            on_progress("measuring", min(clock() - begin[0], config.duration_s), config.duration_s)
        else:
            total = len(config.trace) if config.num_requests is None else config.num_requests
            on_progress("measuring", min(len(load.finished) - warm_requests, total), total)
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


def _is_over(config: BenchConfig, load: BenchLoad, elapsed_s: float, num_finished: int) -> bool:
    if config.duration_s is not None and elapsed_s >= config.duration_s:
        return True
    if config.arrivals.is_open_loop:
        return load.is_over
    return config.num_requests is not None and num_finished >= config.num_requests


def _patience_ms(load: BenchLoad, now: float, time_scale: float) -> int:
    """How long to wait for agents: not beyond the next request that is due."""
    if load.next_due_s is None:
        return _PATIENCE_MS
    return max(0, min(_PATIENCE_MS, math.ceil(1000 * (load.next_due_s - now) * time_scale)))


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


def _result(
    load: BenchLoad, begin: _Snapshot, end: _Snapshot, *, adaptation: AdaptationLog, cut_short: str
) -> BenchResult:
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
        peak_in_flight=load.peak_in_flight,
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
