"""Which numbers of rows layers run with."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helixbench.profiler.cost.padding import candidates, choose_row_sizes, rows_of, rows_of_all
from helixbench.profiler.measure.row_timing import measure_row_sizes
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage.stage import Stage
from tests.conftest import ModelDir

SIZES = st.sets(st.integers(2, 200), max_size=8).map(lambda more: (1, *sorted(more)))


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (1, 1), (2, 4), (4, 4), (5, 9), (9, 9), (10, 10), (500, 500)])
def test_a_batch_runs_with_the_least_size_that_holds_it(tokens: int, rows: int) -> None:
    assert rows_of(tokens, (1, 4, 9)) == rows
    assert rows_of(tokens, ()) == tokens


@given(tokens=st.integers(1, 300), sizes=st.lists(SIZES | st.just(()), max_size=4))
def test_what_all_nodes_run_without_padding_is_the_least_that_they_do(
    tokens: int, sizes: list[tuple[int, ...]]
) -> None:
    found = rows_of_all(tokens, sizes)
    fitting = (n for n in range(tokens, 1000) if all(rows_of(n, each) == n for each in sizes))
    assert found == next(fitting)


@given(times=st.dictionaries(st.integers(2, 64), st.floats(0.1, 10), min_size=1), one_s=st.floats(0.1, 10))
def test_time_hardly_falls_from_one_size_to_a_larger_one_and_none_is_left_out_that_is_worth_it(
    times: dict[int, float], one_s: float
) -> None:
    times[1] = one_s
    sizes = choose_row_sizes(times)
    assert sizes[0] == 1
    assert sizes[-1] == max(times)
    for low, high in pairwise(sizes[1:]):
        assert times[low] <= 0.97 * times[high]
    for tokens, seconds in times.items():
        assert seconds >= 0.97 * min(times[size] for size in sizes if size >= tokens)


def test_twelve_rows_run_as_sixteen_where_that_is_quicker() -> None:
    """As measured on one processor: microseconds of a layer's products."""
    times = {1: 1129, 2: 1132, 3: 1223, 4: 1729, 6: 1912, 9: 2373, 10: 2737, 12: 2789, 14: 3129, 16: 2568, 20: 2713}
    assert choose_row_sizes(times) == (1, 2, 3, 4, 6, 9, 16, 20)


@pytest.mark.parametrize("max_rows", [1, 7, 16, 100, 128, 500])
def test_candidates_go_up_to_the_largest_batch(max_rows: int) -> None:
    found = candidates(max_rows)
    assert found == tuple(sorted(set(found)))
    assert found[-1] == max_rows
    assert set(range(1, min(16, max_rows) + 1)) <= set(found)


def test_sizes_are_measured_on_the_layers_of_a_stage(model_dir: ModelDir) -> None:
    files = ModelFiles(model_dir("test-llama"))
    stage = Stage(files, start=1, end=3, kv_capacity_tokens=4, dtype=torch.float32, device=torch.device("cpu"))
    sizes = measure_row_sizes(stage, max_rows=24)
    assert sizes[0] == 1
    assert sizes[-1] == 24
    stage.device = torch.device("cuda")
    assert measure_row_sizes(stage, max_rows=24) == ()
