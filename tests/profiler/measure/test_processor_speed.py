from __future__ import annotations

import math

import pytest

from helixbench.profiler.measure.processor_speed import ProcessorSpeed, mean_speed

NOMINAL = ProcessorSpeed(weights_s=5e-5, matmul_s=6e-5)


def slower(streaming: float, matmul: float) -> ProcessorSpeed:
    return ProcessorSpeed(weights_s=NOMINAL.weights_s * streaming, matmul_s=NOMINAL.matmul_s * matmul)


@pytest.mark.parametrize("times", [(0.0, 1e-5), (1e-5, -1.0), (math.nan, 1e-5), (1e-5, math.inf)])
def test_impossible_times_are_refused(times: tuple[float, float]) -> None:
    """They come in plans and over sockets, and everything is divided by them."""
    with pytest.raises(ValueError, match="need times > 0 s, got"):
        ProcessorSpeed(*times)


def test_the_speed_is_the_mean_of_the_last_runs() -> None:
    runs = [slower(5, 5), *[slower(1, 1), slower(1.5, 1.2)] * 5]
    assert _relative(mean_speed(runs, last=4)) == pytest.approx((1.25, 1.1))


def test_a_run_that_was_disturbed_by_far_counts_for_twice_the_median() -> None:
    runs = [slower(1, 1), slower(9, 1.5), slower(1, 1), slower(1, 1)]
    assert _relative(mean_speed(runs, last=4)) == pytest.approx((1.25, 1.125))


def _relative(speed: ProcessorSpeed) -> tuple[float, float]:
    return speed.weights_s / NOMINAL.weights_s, speed.matmul_s / NOMINAL.matmul_s
