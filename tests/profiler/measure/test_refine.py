from __future__ import annotations

import msgspec
import pytest

from helixbench.profiler.cost.fit import fit_cost, relative_errors
from helixbench.profiler.cost.measured import CostSample
from helixbench.profiler.cost.model import BatchShape
from helixbench.profiler.measure.grid import GridPoint
from helixbench.profiler.measure.refine import MAX_POINTS, POINTS_A_TURN, points_to_add

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def points(sizes: tuple[int, ...] = SIZES) -> list[GridPoint]:
    made = [
        GridPoint(part="layers", num_layers=layers, decodes=(16,) * size, held_out=size in (3, 12, 48, 96))
        for layers in (4, 8)
        for size in sizes
    ]
    return made + [GridPoint(part="layers", num_layers=8, prefills=((0, size),)) for size in (32, 128)]


def time_s(shape: BatchShape, num_layers: int, *, jump_at: float) -> float:
    per_layer = 1e-3 + 1e-5 * shape.tokens + 1e-3 * (shape.tokens > jump_at)
    return 1e-3 + num_layers * per_layer


def samples(
    of: list[GridPoint], *, jump_at: float = 1e9, spread: float = 0.005, variation: float = 0.0
) -> list[CostSample]:
    return [
        CostSample(
            num_layers=point.num_layers,
            first=False,
            last=False,
            batch=point.shape,
            median_s=time_s(point.shape, point.num_layers, jump_at=jump_at),
            spread=spread,
            variation=variation,
            repeats=3,
            held_out=point.held_out,
        )
        for point in of
    ]


HELD = (*SIZES, 3, 12, 48, 96)


def test_nothing_is_added_where_the_fit_meets_all() -> None:
    of = points(HELD)
    taken = samples(of)
    cost = fit_cost(taken, workspace_bytes=0, max_batch_tokens=128, source="")
    assert points_to_add(of, taken, cost, already_added=0) == ()


def test_bisection_goes_to_the_jump_and_lowers_the_error() -> None:
    of = points(HELD)
    taken = samples(of, jump_at=41)
    before = fit_cost(taken, workspace_bytes=0, max_batch_tokens=128, source="")

    added: list[GridPoint] = []
    while True:
        cost = fit_cost(taken, workspace_bytes=0, max_batch_tokens=128, source="")
        new = points_to_add(of, taken, cost, already_added=len(added))
        if not new:
            break
        assert len(new) <= POINTS_A_TURN
        added += new
        of = [*of, *new]
        taken += [msgspec.structs.replace(s, is_refined=True) for s in samples(list(new), jump_at=41)]

    assert 1 <= len(added) <= MAX_POINTS
    assert all(32 <= point.num_tokens <= 64 for point in added)
    assert not any(point.held_out for point in added)
    assert relative_errors(cost.stage, taken).max() < relative_errors(before.stage, taken).max() * 0.8


@pytest.mark.parametrize("noise", [{"spread": 0.5}, {"variation": 0.5}])
def test_what_is_within_the_noise_is_left_alone(noise: dict[str, float]) -> None:
    of = points(HELD)
    taken = samples(of, jump_at=41, **noise)
    cost = fit_cost(taken, workspace_bytes=0, max_batch_tokens=128, source="")
    assert points_to_add(of, taken, cost, already_added=0) == ()


def test_there_is_a_cap() -> None:
    of = points(HELD)
    taken = samples(of, jump_at=41)
    cost = fit_cost(taken, workspace_bytes=0, max_batch_tokens=128, source="")
    assert points_to_add(of, taken, cost, already_added=MAX_POINTS) == ()
