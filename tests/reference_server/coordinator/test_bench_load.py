"""The requests of a measured run are those of a simulated one."""

from __future__ import annotations

import msgspec

from helixbench.reference_server.coordinator.bench_load import BenchConfig, BenchLoad
from helixbench.reference_server.simulation.load import Load
from helixbench.solver.problem.arrivals import Arrivals
from helixbench.solver.problem.traces import TracedRequest
from helixbench.solver.problem.workload import Workload
from helixbench.solver.scheduling.requests import TokenEvent

WORKLOAD = Workload(source="mixed", lengths=((5, 9), (30, 4), (12, 1), (1, 17)))


def test_one_seed_gives_the_lengths_that_are_simulated() -> None:
    config = BenchConfig(workload=WORKLOAD, concurrency=6, seed=3, vocab_size=320, num_requests=20)
    served = BenchLoad(config, lambda: 0.0).new_requests(40, 0.0)
    simulated = Load(Arrivals(kind="closed loop"), WORKLOAD, concurrency=40, seed=3).following(0, 0.0)
    assert [(len(r.prompt), r.max_tokens) for r in served] == [(len(r.prompt), r.max_tokens) for r in simulated]


def test_a_request_that_ends_without_its_tokens_is_counted_and_not_followed() -> None:
    config = BenchConfig(workload=WORKLOAD, concurrency=1, seed=0, vocab_size=9, num_requests=1)
    load = BenchLoad(config, lambda: 0.0)
    (request,) = load.new_requests(1, 0.0)

    assert load.record([TokenEvent(request=request.number, token=None, pipeline=None, reason="error")]) == []
    assert load.num_failed == 1
    assert load.finished == []


POISSON = Arrivals(kind="gamma", rate_per_s=40.0, burstiness=0.5)


def open_loop(**changes: object) -> BenchConfig:
    made = BenchConfig(workload=WORKLOAD, concurrency=None, seed=3, vocab_size=320, arrivals=POISSON, num_requests=50)
    return msgspec.structs.replace(made, **changes)


def test_an_open_loop_sends_what_is_simulated_when_it_is_due() -> None:
    served, now = [], 0.0
    load = BenchLoad(open_loop(), lambda: now)
    simulated = Load(POISSON, WORKLOAD, limit=50, seed=3)
    while load.next_due_s is not None:
        now = load.next_due_s
        served += [(now, len(r.prompt), r.max_tokens) for r in load.due(now)]
    expected = []
    while (coming := simulated.next_arrival()) is not None:
        expected.append((coming[0], len(coming[1].prompt), coming[1].max_tokens))
    assert served == expected
    assert len(served) == 50


def test_nothing_is_sent_before_it_is_due_and_late_ones_all_at_once() -> None:
    load = BenchLoad(open_loop(), lambda: 9.0)
    first = load.next_due_s
    assert first is not None
    assert load.due(first / 2) == []
    assert len(load.due(9.0)) == load.peak_in_flight == 50


def test_a_request_that_was_sent_late_waited_since_it_was_due() -> None:
    trace = (TracedRequest(0.0, 5, 1), TracedRequest(4.0, 5, 1))
    config = open_loop(arrivals=Arrivals(kind="replay", speedup=2.0), trace=trace, num_requests=None)
    load = BenchLoad(config, lambda: 7.0)
    requests = load.due(7.0)
    load.record([TokenEvent(request=r.number, token=1, pipeline=0, reason="length") for r in requests])
    assert [(r.arrival_s, r.first_token_s) for r in load.finished] == [(0.0, 7.0), (2.0, 7.0)]
    assert load.is_over


def test_what_ends_in_an_open_loop_is_followed_by_nothing() -> None:
    load = BenchLoad(open_loop(num_requests=1), lambda: 9.0)
    (request,) = load.due(9.0)
    assert not load.is_over
    assert load.record([TokenEvent(request=request.number, token=1, pipeline=0, reason="length")]) == []
    assert load.is_over
