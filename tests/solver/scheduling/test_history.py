"""What a node did over time: nothing is lost or counted twice, and it never grows."""

from __future__ import annotations

import random

import pytest

from helixbench.reference_server.run_log import node_points
from helixbench.solver.scheduling.history import FIRST_WIDTH_S, MAX_INTERVALS, History, HistoryKeeper, Interval


def test_an_iteration_counts_where_it_ends_and_its_time_where_it_was_spent() -> None:
    keeper = HistoryKeeper()
    keeper.add(10.0, 10.1, decode_tokens=3, kv_tokens=40)
    keeper.add(10.2, 10.6, decode_tokens=5, kv_tokens=60)

    history = keeper.read(11.1)

    assert (history.width_s, history.age_s) == (FIRST_WIDTH_S, pytest.approx(1.1))
    assert [(i.iterations, i.decode_tokens, i.kv_tokens) for i in history.intervals] == [
        (1, 3, 40),
        (0, 0, 40),
        (1, 5, 60),
        (0, 0, 60),
        (0, 0, 60),
    ]
    assert [i.busy_s for i in history.intervals] == pytest.approx([0.15, 0.25, 0.1, 0.0, 0.0])


@pytest.mark.parametrize("gap_s", [0.01, 1.0, 400.0, 1e5])
def test_sums_stay_whole_and_the_number_of_intervals_bounded(gap_s: float) -> None:
    rng = random.Random(7)
    keeper, now, busy, tokens = HistoryKeeper(), 5.0, 0.0, 0
    for _ in range(300):
        end = now + rng.uniform(0.001, 0.9)
        batch = rng.randrange(20)
        keeper.add(now, end, decode_tokens=batch, kv_tokens=batch)
        busy, tokens = busy + end - now, tokens + batch
        now = end + rng.uniform(0, gap_s)

    history = keeper.read(now)

    assert len(history.intervals) <= MAX_INTERVALS
    assert (len(history.intervals) - 1) * history.width_s <= history.age_s == pytest.approx(now - 5.0)
    assert sum(i.iterations for i in history.intervals) == 300
    assert sum(i.decode_tokens for i in history.intervals) == tokens
    assert sum(i.busy_s for i in history.intervals) == pytest.approx(busy)
    assert all(-1e-6 <= i.busy_s <= history.width_s + 1e-6 for i in history.intervals)


def test_before_any_iteration_there_is_nothing() -> None:
    assert HistoryKeeper().read(3.0).intervals == ()


def test_a_series_stands_on_the_clock_of_the_run() -> None:
    history = History(
        width_s=1.0, age_s=3.5, intervals=(Interval(1, 4, 0.5, 10), Interval(0, 0, 0.2, 10), Interval(2, 6, 1.0, 20))
    )

    points = node_points(history, read_s=3.0)

    # The first interval began half a second before the run; it reaches into it, and so it stays.
    assert [(p.end_s, p.batch_tokens, p.kv_tokens) for p in points] == [(0.5, 4.0, 10), (1.5, None, 10), (2.5, 3.0, 20)]
    assert [p.busy for p in points] == pytest.approx([0.5, 0.2, 1.0])


def test_intervals_before_the_run_are_left_out_and_the_last_one_ends_with_it() -> None:
    history = History(width_s=1.0, age_s=2.5, intervals=(Interval(1, 1, 0.1, 1),) * 3)

    assert [p.end_s for p in node_points(history, read_s=1.0)] == [0.5, 1.0]
