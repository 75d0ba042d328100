from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixbench.profiler.measure.pace import PacedWork, Sensitivity, mean_work, paced_work, seconds_at_pace
from helixbench.profiler.measure.processor_speed import MATMUL_FLOPS, ProcessorSpeed

NOMINAL = ProcessorSpeed(weights_s=5e-5, matmul_s=6e-5)
POWERS = Sensitivity(arithmetic_weights=0.1, arithmetic_matmul=0.7, other_weights=0.5, other_matmul=0.3)
SECONDS = st.floats(1e-6, 1e-2)
SPEEDS = st.builds(ProcessorSpeed, weights_s=SECONDS, matmul_s=SECONDS)
SENSITIVITIES = st.builds(
    Sensitivity,
    arithmetic_weights=st.floats(0, 1),
    arithmetic_matmul=st.floats(0, 1),
    other_weights=st.floats(0, 1),
    other_matmul=st.floats(0, 1),
)


@given(speed=SPEEDS, cpu_s=SECONDS, flops=st.floats(0, 1e12), powers=SENSITIVITIES)
def test_at_the_pace_an_iteration_takes_what_it_took(
    speed: ProcessorSpeed, cpu_s: float, flops: float, powers: Sensitivity
) -> None:
    work = paced_work(speed, now=speed, cpu_s=cpu_s, flops=flops)
    assert seconds_at_pace(work, powers) == pytest.approx(cpu_s)


def test_arithmetic_and_all_else_go_with_the_works_at_their_own_powers() -> None:
    now = ProcessorSpeed(weights_s=2 * NOMINAL.weights_s, matmul_s=3 * NOMINAL.matmul_s)
    other = seconds_at_pace(paced_work(NOMINAL, now=now, cpu_s=1e-3, flops=0.0), POWERS)
    assert other == pytest.approx(1e-3 / 2**0.5 / 3**0.3)
    arithmetic = seconds_at_pace(paced_work(NOMINAL, now=now, cpu_s=1e-3, flops=100 * MATMUL_FLOPS), POWERS)
    assert arithmetic == pytest.approx(1e-3 / 2**0.1 / 3**0.7)
    flops = 1e-3 / now.matmul_s * MATMUL_FLOPS  # half of 2 ms
    both = seconds_at_pace(paced_work(NOMINAL, now=now, cpu_s=2e-3, flops=flops), POWERS)
    assert both == pytest.approx(other + arithmetic)


@given(other=SPEEDS, now=SPEEDS, later=SPEEDS, cpu_s=SECONDS, powers=SENSITIVITIES)
def test_another_pace_changes_all_iterations_alike(
    other: ProcessorSpeed, now: ProcessorSpeed, later: ProcessorSpeed, cpu_s: float, powers: Sensitivity
) -> None:
    profiled, served = (
        seconds_at_pace(paced_work(other, now=speed, cpu_s=cpu_s, flops=0.0), powers)
        / seconds_at_pace(paced_work(NOMINAL, now=speed, cpu_s=cpu_s, flops=0.0), powers)
        for speed in (now, later)
    )
    assert profiled == pytest.approx(served)


def test_iterations_of_a_batch_have_the_mean_of_their_seconds_and_of_their_slowdowns_logarithms() -> None:
    first = PacedWork(cpu_s=1.0, arithmetic=0.2, weights=1.0, matmul=4.0)
    second = PacedWork(cpu_s=3.0, arithmetic=0.4, weights=4.0, matmul=1.0)
    mean = mean_work([first, second])
    assert (mean.cpu_s, mean.arithmetic) == pytest.approx((2.0, 0.3))
    assert (mean.weights, mean.matmul) == pytest.approx((2.0, 2.0))


@pytest.mark.parametrize("power", [-0.1, 4.1, math.inf, math.nan])
def test_impossible_powers_are_refused(power: float) -> None:
    with pytest.raises(ValueError, match="other_matmul: need a power from 0 to 4, got"):
        Sensitivity(arithmetic_weights=0.0, arithmetic_matmul=0.0, other_weights=0.0, other_matmul=power)


def test_nothing_done_takes_no_time() -> None:
    assert seconds_at_pace(paced_work(NOMINAL, now=NOMINAL, cpu_s=0.0, flops=1e9), POWERS) == 0
    assert not math.isnan(paced_work(NOMINAL, now=NOMINAL, cpu_s=0.0, flops=0.0).arithmetic)
