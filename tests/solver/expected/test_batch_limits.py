"""Which limits on iterations are chosen, given what is expected under each."""

from __future__ import annotations

from helixbench.solver.expected.batch_limits import FINALISTS, Batching, best_batching
from helixbench.solver.problem.capacity import request_mix
from helixbench.solver.problem.plan import Expected
from helixbench.solver.problem.workload import fixed_workload

MIX = request_mix(fixed_workload(prompt_tokens=64, output_tokens=32))


OPTIONS = {"in_flight": 24.0, "stages": 4, "mix": MIX, "max_batch_tokens": 128, "thorough": True}


def expected(total: float) -> Expected:
    return Expected(concurrency=24, total_tokens_per_s=total, output_tokens_per_s=total / 3, ttft_s=None, tpot_s=None)


def test_limits_that_only_look_best_at_first_are_left_for_those_that_last() -> None:
    """Without a limit groups merge later: 300 at first, 250 once settled. Six a group keep their 290."""
    settled: list[Batching] = []

    def at_first(batching: Batching) -> Expected:
        return expected(300.0 if batching == Batching() else 290.0 if batching.max_decode_batch == 6 else 100.0)

    def later(batching: Batching) -> Expected:
        settled.append(batching)
        return expected(250.0 if batching == Batching() else 290.0)

    short, _ = best_batching(at_first, **OPTIONS)  # type: ignore[arg-type]
    long, promised = best_batching(at_first, **OPTIONS, settled_under=later)  # type: ignore[arg-type]

    assert short == Batching()
    assert long.max_decode_batch == 6
    assert promised.total_tokens_per_s == 290.0
    assert len(settled) == FINALISTS
    assert Batching() in settled


def test_no_limits_are_chosen_where_none_could_be_simulated() -> None:
    assert best_batching(lambda _: None, **OPTIONS) is None  # type: ignore[arg-type]
    only = best_batching(lambda b: expected(9.0) if b == Batching() else None, **OPTIONS)  # type: ignore[arg-type]
    assert only == (Batching(), expected(9.0))


def test_the_first_look_decides_where_nothing_settles() -> None:
    def at_first(batching: Batching) -> Expected:
        return expected(300.0 if batching.max_decode_batch == 6 else 100.0)

    found = best_batching(at_first, **OPTIONS, settled_under=lambda _: None)  # type: ignore[arg-type]
    assert found is not None
    assert (found[0].max_decode_batch, found[1].total_tokens_per_s) == (6, 300.0)
