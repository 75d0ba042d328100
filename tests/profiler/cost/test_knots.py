from __future__ import annotations

import numpy as np
import pytest

from helixbench.profiler.cost.knots import power_of_two_knots, tile_knots
from helixbench.profiler.cost.nnls import biweight, least_squares


def test_an_edge_between_close_samples_has_a_knot_at_both_sides() -> None:
    assert tile_knots([50, 60, 70, 120, 140]) == (64.0, 65.0, 128.0, 129.0)


@pytest.mark.parametrize(
    "tokens",
    [
        [64, 128, 256],  # a whole tile apart
        [250, 500, 750],  # several edges between two samples
        [16, 32],
        [70, 75, 80],  # none
        [],
        [8],
    ],
)
def test_an_edge_that_samples_do_not_resolve_has_none(tokens: list[float]) -> None:
    assert tile_knots(tokens) == ()


def test_powers_of_two_below_the_largest_batch() -> None:
    assert power_of_two_knots(128) == (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
    assert power_of_two_knots(1) == (1.0,)


def test_both_losses_give_exact_coefficients_back() -> None:
    draw = np.random.default_rng(0)
    rows, true = draw.uniform(0, 3, (40, 4)), np.array([2.0, 0.0, 1.0, 5.0])
    for regression in (least_squares, biweight):
        assert regression(rows, rows @ true) == pytest.approx(true, abs=1e-9)


def test_biweight_lets_far_samples_go_and_least_squares_does_not() -> None:
    draw = np.random.default_rng(1)
    rows, true = draw.uniform(1, 3, (60, 3)), np.array([1.0, 2.0, 3.0])
    times = rows @ true * draw.normal(1, 0.005, 60)
    times[:8] *= 1.6
    assert biweight(rows, times) == pytest.approx(true, rel=0.05)
    assert np.abs(least_squares(rows, times) / true - 1).max() > 0.05


def test_no_coefficient_is_negative() -> None:
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0], [1.0, 4.0]])
    for regression in (least_squares, biweight):
        assert regression(rows, np.array([4.0, 3.0, 2.0, 1.0])).min() >= 0
