"""A run ends with its work: what comes later changes nothing, and a window without work is no measurement."""

from __future__ import annotations

import pytest

from helixbench.errors import MeasurementError
from helixbench.reference_server.run_log import RunLog
from helixbench.reference_server.simulation import (
    Arrivals,
    SimulationConfig,
    SimulationResult,
    TracedRequest,
    simulate,
    simulator,
)
from helixbench.solver.simulation.events import Event, NodeDies, NodeSlows
from tests.reference_server.simulation.cases import OFFLINE, WORKLOAD, four_nodes, two_in_a_row

REPLAY = Arrivals(kind="replay")
LATE = (NodeSlows(at_s=400.0, node="b", factor=2.0), NodeDies(at_s=500.0, node="b"))


def so_many(arrivals: Arrivals, *, num_requests: int = 6, events: tuple[Event, ...] = ()) -> SimulationResult:
    profile, plan = two_in_a_row()
    config = SimulationConfig(
        workload=WORKLOAD,
        arrivals=arrivals,
        num_requests=num_requests,
        duration_s=None,
        warmup_s=0.0,
        events=events,
    )
    return simulate(plan, profile, config)


def replayed(*arrivals_s: float, warmup_s: float = 60.0, duration_s: float = 600.0) -> SimulationResult:
    profile, plan = two_in_a_row()
    trace = tuple(TracedRequest(at_s, 40, 12) for at_s in arrivals_s)
    config = SimulationConfig(workload=WORKLOAD, arrivals=REPLAY, trace=trace, duration_s=duration_s, warmup_s=warmup_s)
    return simulate(plan, profile, config)


def last_s(run: RunLog) -> float:
    return max(request.finish_s for request in run.requests)


@pytest.mark.parametrize("arrivals", [OFFLINE, Arrivals(kind="poisson", rate_per_s=5.0)], ids=str)
def test_what_happens_after_the_work_neither_lengthens_the_window_nor_fails_the_run(arrivals: Arrivals) -> None:
    plain, late = so_many(arrivals), so_many(arrivals, events=LATE)

    assert late.run.requests == plain.run.requests
    assert late.run.window == plain.run.window
    assert late.run.window.end_s == pytest.approx(last_s(plain.run))
    assert late.run.total_tokens_per_s == plain.run.total_tokens_per_s > 0
    (remark,) = late.remarks
    assert remark.endswith("before these events: slow b x 2 at 400 s, kill b at 500 s")
    assert remark in late.run.testbed
    assert plain.remarks == ()


def test_events_after_a_timed_window_are_named() -> None:
    profile, plan = two_in_a_row()
    slow = NodeSlows(at_s=1.0, node="b", factor=1.5)
    config = SimulationConfig(
        workload=WORKLOAD, arrivals=OFFLINE, concurrency=8, duration_s=2.0, warmup_s=0.5, events=(slow, *LATE)
    )
    result = simulate(plan, profile, config)
    assert result.run.window.end_s == 2.5
    assert result.remarks == (
        "1 s: slow b x 1.5",
        "the run had ended at 2.5 s, before these events: slow b x 2 at 400 s, kill b at 500 s",
    )


def test_a_replay_ends_with_the_last_request_of_its_trace() -> None:
    result = replayed(0.0, 62.0, 65.0)

    assert result.run.window.start_s == 60.0
    assert result.run.window.end_s == pytest.approx(last_s(result.run))
    assert result.run.window.seconds < 10
    assert result.run.output_tokens == 2 * 12
    assert "of 600 s: all requests had ended" in result.run.testbed


@pytest.mark.parametrize(
    ("arrivals_s", "says"),
    [
        ((0.0, 40.0), r"all ended by 40\.\d s, before the window begins: give --warmup-s less"),
        ((0.0, 990.0), r"no token came out in the window, 60 s to 660 s: give --duration-s more, or --warmup-s less"),
    ],
)
def test_a_window_in_which_nothing_was_served_is_no_measurement(arrivals_s: tuple[float, ...], says: str) -> None:
    with pytest.raises(MeasurementError, match=f"nothing was measured: {says}"):
        replayed(*arrivals_s)


def test_progress_is_told_in_requests_where_only_they_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "_EVENTS_A_TURN", 40)
    profile, plan = two_in_a_row()
    config = SimulationConfig(
        workload=WORKLOAD, arrivals=OFFLINE, concurrency=2, num_requests=30, duration_s=None, warmup_s=0.0
    )
    told: list[tuple[float, float]] = []
    simulate(plan, profile, config, on_progress=lambda done, total: told.append((done, total)))

    done = [now for now, _ in told]
    assert {total for _, total in told} == {30}
    assert done == sorted(done)
    assert len(set(done)) > 10


@pytest.mark.parametrize("arrivals", [OFFLINE, Arrivals(kind="poisson", rate_per_s=50.0)], ids=str)
def test_what_is_sent_at_the_very_beginning_is_in_a_window_that_begins_there(arrivals: Arrivals) -> None:
    """All work within the window: what a node took in from others is what it ran."""
    profile, plan = four_nodes()
    config = SimulationConfig(workload=WORKLOAD, arrivals=arrivals, num_requests=30, duration_s=None, warmup_s=0.0)
    run = simulate(plan, profile, config).run
    for name, node in run.nodes.items():
        assert sum(link.tokens for link in run.links if link.dst == name) == node.prefill_tokens + node.decode_tokens
