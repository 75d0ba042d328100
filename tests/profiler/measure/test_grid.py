from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixbench.profiler.cost.knots import tile_knots
from helixbench.profiler.measure.grid import GridPoint, grid, layer_counts_to_measure, peak_points
from helixbench.profiler.stage.attention import MAX_GATHERED_SLOTS

FULL = {"layer_counts": (4, 8), "max_batch_tokens": 128, "max_context_tokens": 512}


@given(
    max_batch_tokens=st.integers(8, 4096),
    max_context_tokens=st.integers(32, 8192),
    max_kv_tokens=st.integers(1024, 100_000),
    layers=st.sets(st.integers(1, 80), min_size=1, max_size=2),
)
def test_grid_points_can_be_run_and_stand_once(
    max_batch_tokens: int, max_context_tokens: int, max_kv_tokens: int, layers: set[int]
) -> None:
    made = grid(
        layer_counts=tuple(sorted(layers)),
        max_batch_tokens=max_batch_tokens,
        max_context_tokens=max_context_tokens,
        max_kv_tokens=max_kv_tokens,
    )
    assert len(set(made)) == len(made)
    for point in made:
        assert 0 < point.num_tokens <= max_batch_tokens
        assert point.kv_tokens <= max_kv_tokens
        assert all(past >= 0 and new > 0 for past, new in point.prefills)
        assert min(point.decodes, default=0) >= 0
        assert (point.num_layers == 0) == (point.part != "layers")
    assert {point.part for point in made} == {"layers", "embedding", "head"}
    assert {point.num_layers for point in made if point.part == "layers"} == layers
    assert max(point.num_tokens for point in made) == max_batch_tokens or max_kv_tokens < max_batch_tokens


def test_grid_covers_each_quantity_in_the_fit_and_mixes_out_of_it() -> None:
    made = grid(**FULL, max_kv_tokens=100_000)  # type: ignore[arg-type]
    fitted = [point for point in made if not point.held_out and point.part == "layers"]
    held_out = [point for point in made if point.held_out]

    assert {point.num_layers for point in held_out} == {4, 8}
    assert {point.shape for point in held_out}.isdisjoint(point.shape for point in fitted)
    assert any(point.prefills and point.decodes for point in fitted)
    assert any(point.prefills and point.decodes for point in held_out)
    assert any(past for point in fitted for past, _ in point.prefills), "a chunk that reads what is cached"
    assert max(past for point in fitted for past in point.decodes) == 512
    assert {1, 128} <= {len(point.decodes) for point in fitted}


def test_fewer_layers_run_a_part_of_what_all_do() -> None:
    made = grid(**FULL, max_kv_tokens=100_000)  # type: ignore[arg-type]
    few, many = (
        {(p.prefills, p.decodes, p.held_out) for p in made if p.part == "layers" and p.num_layers == count}
        for count in FULL["layer_counts"]  # type: ignore[attr-defined]
    )

    assert few < many
    assert len(few) < len(many) / 2
    assert {1, 128} <= {len(decodes) for _, decodes, _ in few}
    assert {held_out for prefills, decodes, held_out in few if prefills and decodes} == {True, False}


def test_tile_edges_are_measured_at_both_sides_and_resolved_by_the_fit() -> None:
    sizes = {"layer_counts": (4,), "max_batch_tokens": 256, "max_context_tokens": 512, "max_kv_tokens": 200_000}
    plain, tiled = (grid(**sizes, has_tiles=has_tiles) for has_tiles in (False, True))  # type: ignore[arg-type]

    assert set(plain) < set(tiled)
    tokens = [point.num_tokens for point in tiled if not point.held_out and point.part == "layers"]
    assert {32, 33, 64, 65, 128, 129, 192, 193} <= set(tile_knots(tokens)) <= set(map(float, range(1, 258)))
    assert 64 not in tile_knots([p.num_tokens for p in plain if not p.held_out])


def test_a_node_with_little_room_for_kv_is_measured_on_less() -> None:
    little = grid(**FULL, max_kv_tokens=1024)  # type: ignore[arg-type]
    much = grid(**FULL, max_kv_tokens=100_000)  # type: ignore[arg-type]
    assert set(little) < set(much)
    assert any(point.held_out for point in little)


@given(
    max_batch_tokens=st.integers(1, 4096),
    max_context_tokens=st.integers(1, 200_000),
    max_kv_tokens=st.integers(1024, 1_000_000),
    gather_up_to_tokens=st.sampled_from((0, 192, 1 << 30)),
)
def test_batches_that_need_most_memory_are_extreme_and_can_be_run(
    max_batch_tokens: int, max_context_tokens: int, max_kv_tokens: int, gather_up_to_tokens: int
) -> None:
    points = peak_points(
        num_layers=3,
        max_batch_tokens=max_batch_tokens,
        max_context_tokens=max_context_tokens,
        max_kv_tokens=max_kv_tokens,
        gather_up_to_tokens=gather_up_to_tokens,
    )

    for point in points:
        assert 0 < point.num_tokens <= max_batch_tokens
        assert point.kv_tokens <= max_kv_tokens
        assert all(past >= 0 and new > 0 for past, new in point.prefills)
        assert all(0 <= past < gather_up_to_tokens for past in point.decodes)
    assert max(point.num_tokens for point in points) == min(max_batch_tokens, max_kv_tokens)
    longest = min(max_context_tokens, max_kv_tokens)
    assert max(past + new for point in points for past, new in point.prefills) >= longest
    masks = [new * (past + new) for point in points for past, new in point.prefills if past]
    assert max(masks, default=0) == longest * min(max_batch_tokens, longest - 1)
    together = max(sum(past + 1 for past in point.decodes) for point in points)  # copied
    context = min(longest, gather_up_to_tokens)
    room = min(MAX_GATHERED_SLOTS, max_kv_tokens, max_batch_tokens * context)
    assert together > room - context or not gather_up_to_tokens, "one sequence more would be too much"


def test_shape_of_a_batch() -> None:
    shape = GridPoint(part="layers", num_layers=2, prefills=((10, 4), (0, 3)), decodes=(20, 30, 0)).shape

    assert shape.prefill_tokens == 7
    assert shape.prefill_chunks == 2
    # token k of a chunk sees what is cached, those before it and itself
    assert shape.prefill_pairs == sum(10 + k for k in range(1, 5)) + sum(range(1, 4))
    assert shape.decode_tokens == 3
    assert shape.decode_context_tokens == 21 + 31 + 1
    assert shape.sampled_tokens == 5


@pytest.mark.parametrize(("max_layers", "counts"), [(1, (1,)), (2, (1, 2)), (3, (2, 3)), (14, (7, 14))])
def test_layer_counts_are_half_and_all(max_layers: int, counts: tuple[int, ...]) -> None:
    assert layer_counts_to_measure(max_layers) == counts
