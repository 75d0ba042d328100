"""Simulations from several starts, and their mean."""

from __future__ import annotations

import pytest

from helixbench.solver.expected.curve import _notes
from helixbench.solver.expected.simulated import mean_of, over_starts
from helixbench.solver.problem.plan import Expected
from helixbench.solver.simulation.closed_loop import ClosedLoopResult


def rolled(total: float, *, work: int = 100, is_settled: bool = True, tpot_s: float | None = 0.1) -> ClosedLoopResult:
    expected = Expected(
        concurrency=8,
        total_tokens_per_s=total,
        output_tokens_per_s=total / 2,
        ttft_s=None,
        tpot_s=tpot_s,
        node_busy={"a": total / 100},
        node_batch_tokens={"a": 200 / total},
    )
    return ClosedLoopResult(expected, is_settled, 12.0, work)


def test_what_is_expected_is_the_mean_over_the_starts() -> None:
    seeds: list[int] = []

    def simulate(seed: int) -> ClosedLoopResult:
        seeds.append(seed)
        return rolled((60.0, 50.0, 40.0)[seed], is_settled=seed != 1, tpot_s=(0.1, 0.2, 0.3)[seed])

    found = over_starts(simulate, starts=3, max_work=1000)

    assert found is not None
    assert seeds == [0, 1, 2]
    assert found.totals == (60.0, 50.0, 40.0)
    assert found.expected.total_tokens_per_s == pytest.approx(50.0)
    assert found.expected.output_tokens_per_s == pytest.approx(25.0)
    assert found.expected.tpot_s == pytest.approx(0.2)
    assert found.expected.ttft_s is None
    assert found.expected.node_busy == {"a": pytest.approx(0.5)}
    assert found.expected.node_batch_tokens == {"a": pytest.approx((200 / 60 + 4 + 5) / 3)}
    assert not found.is_settled
    assert found.work == 300


@pytest.mark.parametrize(("max_work", "starts"), [(100, 1), (199, 1), (200, 2), (1000, 3)])
def test_no_more_starts_than_the_work_allows(max_work: int, starts: int) -> None:
    found = over_starts(lambda _: rolled(60.0), starts=3, max_work=max_work)
    assert found is not None
    assert len(found.totals) == starts


def test_a_start_that_was_cut_off_counts_for_nothing() -> None:
    found = over_starts(lambda seed: None if seed == 1 else rolled(60.0 - seed), starts=3, max_work=1000)
    assert found is not None
    assert found.totals == (60.0, 58.0)
    assert over_starts(lambda _: None, starts=3, max_work=1000) is None


def test_a_plan_says_where_groups_are_chance() -> None:
    assert _notes(mean_of([rolled(60.0), rolled(59.0)])) == []
    (note,) = _notes(mean_of([rolled(60.0), rolled(50.0), rolled(55.0)]))
    assert "mean of 3 simulations with 50 to 60 tokens/s" in note


def test_the_mean_of_one_is_itself() -> None:
    assert mean_of([rolled(60.0)]).expected == rolled(60.0).expected
