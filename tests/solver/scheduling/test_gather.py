"""A node that holds the whole model waits for its last batch, briefly."""

from __future__ import annotations

import pytest

from helixbench.solver.scheduling.gather import SKIPPED_AFTER_TIMEOUT, WAIT_SHARE, Gather


def test_waits_until_all_of_the_batch_are_back() -> None:
    gather: Gather[int] = Gather()

    gather.sampled({1, 2}, now_s=10.0, iteration_s=1.0)
    assert gather.wait_s(10.0) == pytest.approx(WAIT_SHARE)
    gather.returned([1])
    assert gather.wait_s(10.01) > 0
    gather.returned([2, 3])
    assert gather.wait_s(10.01) == 0


def test_waits_no_longer_than_its_share_of_an_iteration_and_then_not_for_a_while() -> None:
    gather: Gather[int] = Gather()
    gather.sampled({1}, now_s=0.0, iteration_s=1.0)
    assert gather.wait_s(WAIT_SHARE) == 0

    for _ in range(SKIPPED_AFTER_TIMEOUT):
        gather.sampled({1}, now_s=1.0, iteration_s=1.0)
        assert gather.wait_s(1.0) == 0
    gather.sampled({1}, now_s=1.0, iteration_s=1.0)
    assert gather.wait_s(1.0) > 0


def test_a_batch_that_goes_on_to_other_nodes_is_not_waited_for() -> None:
    gather: Gather[int] = Gather()
    gather.sampled(set(), now_s=0.0, iteration_s=1.0)
    assert gather.wait_s(0.0) == 0
