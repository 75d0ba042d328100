from __future__ import annotations

import random
import statistics

import msgspec
import pytest

from helixbench.profiler.measure.grid import GridPoint
from helixbench.profiler.measure.pace import USUAL, PacedWork, Sensitivity
from helixbench.profiler.measure.sampler import Block
from helixbench.profiler.measure.sensitivity import at_sensitivity, measure_sensitivity

TRUE = Sensitivity(arithmetic_weights=0.1, arithmetic_matmul=0.9, other_weights=0.9, other_matmul=0.3)


def blocks(
    powers: Sensitivity, *, count: int = 60, swing: float = 0.15, noise: float = 0.02, arithmetic: float | None = None
) -> list[Block]:
    """Three blocks each of ``count`` batches on a machine whose speed swings; iterations follow it at these powers."""
    draw = random.Random(1)
    made = []
    for size in range(1, count + 1):
        part = draw.random() if arithmetic is None else arithmetic
        for _ in range(3):
            weights, matmul = draw.lognormvariate(0, swing), draw.lognormvariate(0, swing)
            slow = (weights**powers.arithmetic_weights * matmul**powers.arithmetic_matmul) ** part
            slow *= (weights**powers.other_weights * matmul**powers.other_matmul) ** (1 - part)
            work = PacedWork(
                cpu_s=0.01 * size * slow * draw.lognormvariate(0, noise),
                arithmetic=part,
                weights=weights,
                matmul=matmul,
            )
            point = GridPoint(part="layers", num_layers=2, decodes=(1,) * size)
            made.append(Block(point=point, mean_s=10 * work.cpu_s, deviation_s=work.cpu_s, work=work))
    return made


def powers_of(sensitivity: Sensitivity) -> list[float]:
    return [getattr(sensitivity, name) for name in sensitivity.__struct_fields__]


def test_the_powers_of_a_machine_are_found_in_its_blocks() -> None:
    assert powers_of(measure_sensitivity(blocks(TRUE))) == pytest.approx(powers_of(TRUE), abs=0.08)


def test_some_blocks_that_were_disturbed_by_far_change_nothing() -> None:
    measured = blocks(TRUE)
    for index in range(0, len(measured), 20):
        work = measured[index].work
        assert work is not None
        spoilt = msgspec.structs.replace(work, cpu_s=3 * work.cpu_s)
        measured[index] = msgspec.structs.replace(measured[index], work=spoilt)
    assert powers_of(measure_sensitivity(measured)) == pytest.approx(powers_of(TRUE), abs=0.12)


def test_on_a_machine_whose_speed_hardly_changes_the_powers_stay_the_usual_ones() -> None:
    assert powers_of(measure_sensitivity(blocks(TRUE, swing=0.001))) == pytest.approx(powers_of(USUAL), abs=0.02)


def test_without_arithmetic_nothing_is_learnt_of_it() -> None:
    found = measure_sensitivity(blocks(TRUE, arithmetic=0.0))
    assert (found.other_weights, found.other_matmul) == pytest.approx((0.9, 0.3), abs=0.05)
    usual = (USUAL.arithmetic_weights, USUAL.arithmetic_matmul)
    assert (found.arithmetic_weights, found.arithmetic_matmul) == pytest.approx(usual)


@pytest.mark.parametrize("measured", [[], blocks(TRUE)[:1], blocks(TRUE)[::3]])
def test_batches_that_were_measured_once_tell_nothing(measured: list[Block]) -> None:
    assert measure_sensitivity(measured) == USUAL


def test_no_power_is_negative() -> None:
    """As noise alone may have it: here the works slow down when iterations do not."""
    swapped = []
    for block in blocks(TRUE):
        assert block.work is not None
        work = msgspec.structs.replace(block.work, weights=1 / block.work.weights, matmul=1 / block.work.matmul)
        swapped.append(msgspec.structs.replace(block, work=work))
    assert powers_of(measure_sensitivity(swapped)) == [0.0, 0.0, 0.0, 0.0]


def test_blocks_of_a_batch_agree_once_they_are_corrected_by_what_they_tell() -> None:
    measured = blocks(TRUE)
    raw = [msgspec.structs.replace(block, mean_s=block.work.cpu_s) for block in measured if block.work]
    none = Sensitivity(arithmetic_weights=0, arithmetic_matmul=0, other_weights=0, other_matmul=0)

    paced = at_sensitivity(raw, measure_sensitivity(measured), before=none)

    assert [block.point for block in paced] == [block.point for block in raw]
    assert _scatter(paced) < 0.03 < 0.1 < _scatter(raw), "of the noise of 2 % that no correction takes out"


def test_blocks_of_a_node_that_is_not_held_back_stay_as_they_are() -> None:
    plain = Block(point=GridPoint(part="layers", num_layers=2, decodes=(1,)), mean_s=1.0)
    assert at_sensitivity([plain], TRUE, before=USUAL) == (plain,)


def _scatter(measured: list[Block] | tuple[Block, ...]) -> float:
    of_batch: dict[GridPoint, list[float]] = {}
    for block in measured:
        of_batch.setdefault(block.point, []).append(block.mean_s)
    return statistics.fmean(statistics.stdev(times) / statistics.fmean(times) for times in of_batch.values())
