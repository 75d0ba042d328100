from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.processor_speed import MATMUL_FLOPS, ProcessorSpeed, mean_speed, seconds_at

NOMINAL = ProcessorSpeed(weights_s=5e-5, matmul_s=6e-5)
SECONDS = st.floats(1e-6, 1e-2)
SPEEDS = st.builds(ProcessorSpeed, weights_s=SECONDS, matmul_s=SECONDS)


def slower(streaming: float, matmul: float) -> ProcessorSpeed:
    return ProcessorSpeed(weights_s=NOMINAL.weights_s * streaming, matmul_s=NOMINAL.matmul_s * matmul)


@given(speed=SPEEDS, cpu_s=SECONDS, flops=st.floats(0, 1e12))
def test_at_its_own_speed_an_iteration_takes_what_it_took(speed: ProcessorSpeed, cpu_s: float, flops: float) -> None:
    assert seconds_at(speed, now=speed, lately=speed, cpu_s=cpu_s, flops=flops) == pytest.approx(cpu_s)


@given(factor=st.floats(0.3, 3), cpu_s=SECONDS, flops=st.floats(0, 1e12))
def test_what_slows_all_work_down_alike_is_taken_out(factor: float, cpu_s: float, flops: float) -> None:
    """In the moment; where the machine stays slow an iteration takes more than that, and that is taken out too."""
    now = slower(factor, factor)
    alike = seconds_at(NOMINAL, now=now, lately=NOMINAL, cpu_s=cpu_s, flops=flops)
    assert alike == pytest.approx(cpu_s / factor)
    lasting = seconds_at(NOMINAL, now=now, lately=now, cpu_s=cpu_s, flops=flops)
    assert lasting == pytest.approx(cpu_s / factor**1.38)


def test_arithmetic_goes_with_the_matrix_product_and_the_rest_mostly_with_streaming() -> None:
    now = slower(2.0, 1.0)
    all_of_it = 100 * MATMUL_FLOPS
    assert seconds_at(NOMINAL, now=now, lately=NOMINAL, cpu_s=1e-3, flops=all_of_it) == pytest.approx(1e-3)
    without = seconds_at(NOMINAL, now=now, lately=NOMINAL, cpu_s=1e-3, flops=0.0)
    assert without == pytest.approx(1e-3 / 2**0.8)
    half = seconds_at(NOMINAL, now=now, lately=NOMINAL, cpu_s=2e-3, flops=1e-3 / now.matmul_s * MATMUL_FLOPS)
    assert half == pytest.approx(1e-3 + without)


@given(other_nominal=SPEEDS, now=SPEEDS, later=SPEEDS, cpu_s=SECONDS)
def test_another_nominal_speed_changes_all_iterations_alike(
    other_nominal: ProcessorSpeed, now: ProcessorSpeed, later: ProcessorSpeed, cpu_s: float
) -> None:
    profiled, served = (
        seconds_at(other_nominal, now=speed, lately=speed, cpu_s=cpu_s, flops=0.0)
        / seconds_at(NOMINAL, now=speed, lately=speed, cpu_s=cpu_s, flops=0.0)
        for speed in (now, later)
    )
    assert profiled == pytest.approx(served)


def test_the_speed_is_the_mean_of_the_last_runs() -> None:
    runs = [slower(5, 5), *[slower(1, 1), slower(1.5, 1.2)] * 5]
    assert _relative(mean_speed(runs, last=4)) == pytest.approx((1.25, 1.1))


def test_a_run_that_was_disturbed_by_far_counts_for_twice_the_median() -> None:
    runs = [slower(1, 1), slower(9, 1.5), slower(1, 1), slower(1, 1)]
    assert _relative(mean_speed(runs, last=4)) == pytest.approx((1.25, 1.125))


def _relative(speed: ProcessorSpeed) -> tuple[float, float]:
    return speed.weights_s / NOMINAL.weights_s, speed.matmul_s / NOMINAL.matmul_s
