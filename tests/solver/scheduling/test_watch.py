from __future__ import annotations

import pytest

from helixbench.solver.scheduling.watch import (
    Cause,
    LinkChanged,
    NodeChanged,
    NodeState,
    PeerSeen,
    Report,
    Watch,
)


def report(**fields: object) -> Report:
    usual: dict[str, object] = {
        "due_in_s": 0.5,
        "iterations": 0,
        "measured_s": 0.0,
        "predicted_s": 0.0,
        "has_work": True,
        "progress_age_s": 0.0,
        "kv_used_tokens": 0,
    }
    return Report(**(usual | fields))  # type: ignore[arg-type]


def watching(*nodes: str) -> Watch:
    """All of them progressing at 0 s."""
    watch = Watch(nodes, now_s=0.0, load_s=60.0)
    for node in nodes:
        watch.reported(node, report(), now_s=0.0)
    return watch


def run_until(watch: Watch, end_s: float, *, begin_s: float = 0.0, **reports: Report) -> list[object]:
    """Tick every 0.1 s; nodes of ``reports`` report every 0.5 s."""
    changes: list[object] = []
    for step in range(1, round((end_s - begin_s) * 10) + 1):
        now_s = begin_s + step / 10
        if step % 5 == 0:
            for node, said in reports.items():
                changes += watch.reported(node, said, now_s=now_s)
        changes += watch.tick(now_s)
    return changes


def test_a_silent_node_is_stalled_after_half_a_second_and_lost_after_two() -> None:
    watch = watching("a", "b")

    changes = run_until(watch, 4.0, b=report())

    assert [(c.node, c.after, c.cause) for c in changes if isinstance(c, NodeChanged)] == [
        ("a", NodeState.STALLED, Cause.OVERDUE),
        ("a", NodeState.LOST, Cause.OVERDUE),
    ]
    stalled, lost = (c.at_s for c in changes if isinstance(c, NodeChanged))
    assert (stalled, lost) == pytest.approx((1.1, 2.6))
    assert not watch.takes_requests("a")
    assert watch.takes_requests("b")


def test_a_node_that_announced_a_long_iteration_is_given_that_time() -> None:
    watch = watching("a")
    watch.reported("a", report(due_in_s=30.0), now_s=0.0)

    assert run_until(watch, 30.0) == []
    assert watch.states["a"] is NodeState.PROGRESSING


def test_loading_may_take_as_long_as_was_declared() -> None:
    watch = Watch(["a"], now_s=0.0, load_s=60.0)

    assert run_until(watch, 60.0) == []
    assert run_until(watch, 63.0, begin_s=60.0) != []
    assert watch.states["a"] is NodeState.LOST


def test_nobody_is_late_because_the_watcher_was() -> None:
    watch = watching("a")
    run_until(watch, 1.0, a=report())

    assert watch.tick(11.0) == []
    watch.reported("a", report(), now_s=11.05)
    assert run_until(watch, 12.0, begin_s=11.1, a=report()) == []


def test_a_stalled_node_that_reports_again_takes_requests_again() -> None:
    watch = watching("a")
    run_until(watch, 1.2)
    assert watch.states["a"] is NodeState.STALLED

    (change,) = watch.reported("a", report(), now_s=1.3)

    assert isinstance(change, NodeChanged)
    assert (change.before, change.after) == (NodeState.STALLED, NodeState.PROGRESSING)


def test_a_lost_node_stays_lost_until_it_is_added_again() -> None:
    watch = watching("a")
    watch.lost("a", Cause.DISCONNECTED, now_s=1.0)

    assert watch.reported("a", report(), now_s=1.1) == []
    assert watch.states["a"] is NodeState.LOST

    watch.added("a", now_s=2.0)
    watch.reported("a", report(has_work=False), now_s=2.1)
    assert watch.states["a"] is NodeState.IDLE


@pytest.mark.parametrize(("factor", "state"), [(1.29, NodeState.PROGRESSING), (1.31, NodeState.SLOW)])
def test_slow_is_a_ratio_over_enough_iterations_and_seconds(factor: float, state: NodeState) -> None:
    watch = watching("a")
    for half_second in range(1, 11):
        done = 4 * half_second
        said = report(iterations=done, measured_s=done * 0.1 * factor, predicted_s=done * 0.1)
        watch.reported("a", said, now_s=half_second / 2)
        if half_second < 10:
            assert watch.states["a"] is NodeState.PROGRESSING
    assert watch.states["a"] is state


def test_few_iterations_do_not_make_a_node_slow() -> None:
    watch = watching("a")
    for second in range(1, 10):
        watch.reported("a", report(iterations=second, measured_s=2.0 * second, predicted_s=second), now_s=second)
        assert watch.states["a"] is NodeState.PROGRESSING
    watch.reported("a", report(iterations=10, measured_s=20.0, predicted_s=10.0), now_s=10.0)
    assert watch.states["a"] is NodeState.SLOW
    assert watch.ratios["a"] == pytest.approx(2.0)


def test_a_node_is_slow_until_its_ratio_is_well_below_the_limit() -> None:
    watch = watching("a")
    now_s, done, measured_s = 0.0, 0, 0.0

    def go_on(seconds: int, factor: float) -> None:
        nonlocal now_s, done, measured_s
        for _ in range(2 * seconds):
            now_s, done, measured_s = now_s + 0.5, done + 10, measured_s + 10 * 0.05 * factor
            said = report(iterations=done, measured_s=measured_s, predicted_s=done * 0.05)
            watch.reported("a", said, now_s=now_s)

    go_on(10, 1.5)
    assert watch.states["a"] is NodeState.SLOW
    go_on(10, 1.2)
    assert watch.states["a"] is NodeState.SLOW
    go_on(10, 1.1)
    assert watch.states["a"] is NodeState.PROGRESSING


def test_a_reloaded_stage_begins_its_counts_again() -> None:
    watch = watching("a")
    watch.reported("a", report(iterations=1000, measured_s=100.0, predicted_s=100.0), now_s=5.0)
    for second in range(6, 17):
        done = 10 * (second - 5)
        watch.reported("a", report(iterations=done, measured_s=done * 0.2, predicted_s=done * 0.1), now_s=second)
    assert watch.ratios["a"] == pytest.approx(2.0)


def test_a_link_is_down_while_its_peer_works_and_yet_answers_nothing_on_it() -> None:
    watch = watching("a", "b")
    silent = report(peers=(PeerSeen("b", is_connected=True, silent_s=2.6),))

    (down,) = watch.reported("a", silent, now_s=0.2)
    assert down == LinkChanged("a", "b", False, Cause.PEER_SILENT, 0.2)
    assert watch.links_down == {("a", "b")}
    assert watch.takes_requests("b")

    (up,) = watch.reported("a", report(peers=(PeerSeen("b", is_connected=True, silent_s=0.1),)), now_s=0.7)
    assert up == LinkChanged("a", "b", True, Cause.PEER_ANSWERS, 0.7)
    assert watch.links_down == frozenset()


def test_a_peer_in_a_long_iteration_is_not_a_broken_link() -> None:
    watch = watching("a", "b")
    watch.reported("b", report(due_in_s=10.0), now_s=0.0)

    assert watch.reported("a", report(peers=(PeerSeen("b", is_connected=True, silent_s=11.0),)), now_s=0.1) == []


def test_a_peer_that_is_stalled_itself_is_not_a_broken_link() -> None:
    watch = watching("a", "b")
    run_until(watch, 1.2, a=report())
    assert watch.states["b"] is NodeState.STALLED

    assert watch.reported("a", report(peers=(PeerSeen("b", is_connected=True, silent_s=9.0),)), now_s=1.3) == []


def test_a_draining_node_takes_no_requests_and_can_still_be_lost() -> None:
    watch = watching("a")
    watch.draining("a", now_s=0.0)
    watch.reported("a", report(), now_s=0.1)
    assert watch.states["a"] is NodeState.DRAINING
    assert not watch.takes_requests("a")

    run_until(watch, 3.0, begin_s=0.1)
    assert watch.states["a"] is NodeState.LOST
