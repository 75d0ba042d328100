"""The number in flight that a latency limit leaves room for, against a made-up cluster whose latency is known."""

from __future__ import annotations

import msgspec
import pytest

from helixbench.solver import Plan, SolveConfig, solve_placement
from helixbench.solver.problem.plan import Infeasible
from helixbench.solver.questions.targets import MOST_TRIES, most_within_latency
from tests.solver.clusters import WORKLOAD, demo_cluster

TOKEN_S = 0.01
PROFILE = demo_cluster()


class MadeUp:
    """Answers with plans of which a token takes ``TOKEN_S`` for each request in flight, and tokens/s grow with them.

    With ``is_worse_below`` a plan that was made for more in flight takes twice as long at the numbers below.
    """

    def __init__(self, *, is_worse_below: bool = False, interrupt_at: int | None = None) -> None:
        found = solve_placement(SolveConfig(cluster=PROFILE, workload=WORKLOAD, concurrency=2, method="petals"))
        assert isinstance(found, Plan)
        self._plan, self._is_worse_below, self._interrupt_at = found, is_worse_below, interrupt_at
        self.asked: list[int | None] = []

    def __call__(self, config: SolveConfig) -> Plan | Infeasible:
        assert config.time_limit_s > 0
        self.asked.append(config.concurrency)
        most = config.concurrency or 256
        end = self._plan.predicted.expected[-1]
        numbers = [2**power for power in range(20) if 2**power < most] + [most]
        expected = tuple(
            msgspec.structs.replace(
                end,
                concurrency=number,
                total_tokens_per_s=100.0 * number,
                tpot_s=number * TOKEN_S * (2.0 if self._is_worse_below and number < most else 1.0),
            )
            for number in numbers
        )
        predicted = msgspec.structs.replace(self._plan.predicted, expected=expected)
        status = "interrupted" if most == self._interrupt_at else "search done"
        solver = msgspec.structs.replace(self._plan.solver, status=status)
        return msgspec.structs.replace(self._plan, predicted=predicted, solver=solver)


def most_in_flight(solve: MadeUp, most: float) -> int:
    """Of the plan found where a token may take as long as with ``most`` in flight."""
    config = SolveConfig(cluster=PROFILE, workload=WORKLOAD, max_tpot_s=most * TOKEN_S)
    found = most_within_latency(solve, config, config.capacities())
    assert isinstance(found, Plan)
    return found.predicted.expected[-1].concurrency


@pytest.mark.parametrize("is_worse_below", [False, True])
def test_the_number_in_flight_is_no_power_of_two_where_more_keep_the_limit(is_worse_below: bool) -> None:
    solve = MadeUp(is_worse_below=is_worse_below)
    assert most_in_flight(solve, 44.5) == 44
    assert len(solve.asked) <= 2 + MOST_TRIES


def test_a_first_plan_that_keeps_the_limit_is_the_answer() -> None:
    solve = MadeUp()
    assert most_in_flight(solve, 300.0) == 256
    assert solve.asked == [None]


def test_ctrl_c_ends_the_bisection_with_the_best_so_far() -> None:
    solve = MadeUp(interrupt_at=40)
    assert most_in_flight(solve, 44.5) == 32
    assert solve.asked[-1] == 40
