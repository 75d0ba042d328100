"""The requests of a measured closed loop are those of a simulated one."""

from __future__ import annotations

from helixbench.reference_server.coordinator.bench import BenchConfig, _Load
from helixbench.reference_server.simulation import Arrivals
from helixbench.reference_server.simulation.load import Load
from helixbench.solver.problem.workload import Workload
from helixbench.solver.scheduling.requests import TokenEvent

WORKLOAD = Workload(source="mixed", lengths=((5, 9), (30, 4), (12, 1), (1, 17)))


def test_one_seed_gives_the_lengths_that_are_simulated() -> None:
    config = BenchConfig(workload=WORKLOAD, concurrency=6, seed=3, vocab_size=320, num_requests=20)
    served = _Load(config, lambda: 0.0).new_requests(40, 0.0)
    simulated = Load(Arrivals(kind="closed loop"), WORKLOAD, concurrency=40, seed=3).following(0, 0.0)
    assert [(len(r.prompt), r.max_tokens) for r in served] == [(len(r.prompt), r.max_tokens) for r in simulated]


def test_a_request_that_ends_without_its_tokens_is_counted_and_not_followed() -> None:
    config = BenchConfig(workload=WORKLOAD, concurrency=1, seed=0, vocab_size=9, num_requests=1)
    load = _Load(config, lambda: 0.0)
    (request,) = load.new_requests(1, 0.0)

    assert load.record([TokenEvent(request=request.number, token=None, pipeline=None, reason="error")]) == []
    assert load.num_failed == 1
    assert load.finished == []
