from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from helixbench.profiler.measure.memory import LoadedMemory
from helixbench.profiler.measure.stack import time_stack
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.stage import Stage, StageOutput
from tests.conftest import ModelDir

CPU = torch.device("cpu")


@pytest.fixture
def make_stage(model_dir: ModelDir) -> Callable[..., Stage]:
    def make(model: str = "test-llama", start: int = 1, end: int = 5, kv_capacity_tokens: int = 256) -> Stage:
        return Stage(
            ModelFiles(str(model_dir(model))),
            start=start,
            end=end,
            kv_capacity_tokens=kv_capacity_tokens,
            dtype=torch.float32,
            device=CPU,
        )

    return make


def item(stage: Stage, past: int = 0) -> StageItem:
    hidden = torch.randn((1, stage.hidden_size), generator=torch.Generator().manual_seed(1))
    return StageItem(request=1, past=past, num_tokens=1, entry_layer=stage.start, sample=False, inputs=hidden)


def test_a_view_runs_the_layers_asked_for_in_that_order(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage()
    stage.kv.reserve(1, 4)
    whole = stage.forward([item(stage)]).hidden
    assert whole is not None

    step, hidden = item(stage), None
    for index in range(4):
        hidden = stage.with_layers((index,)).forward([step]).hidden
        assert hidden is not None
        step = StageItem(request=1, past=0, num_tokens=1, entry_layer=stage.start, sample=False, inputs=hidden)
    assert torch.equal(hidden, whole)
    unchanged = stage.with_layers(()).forward([item(stage)]).hidden
    assert torch.equal(unchanged, item(stage).inputs)


def test_layers_of_one_kind_are_timed_together_and_nothing_is_left_behind(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage()
    times = time_stack(stage, rounds=2)

    assert (times.num_layers, times.batch_tokens) == (4, 4)
    assert [(kind.kind, kind.num_layers) for kind in times.kinds] == [("full attention, dense", 4)]
    assert min(times.whole_s, times.sum_of_layers_s, times.one_repeated_s) > 0
    assert times.stack_ratio == times.whole_s / times.sum_of_layers_s
    assert stage.kv.used_tokens == 0


def test_sliding_and_full_attention_are_two_kinds(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage()
    stage._config.layer_types = ["full_attention", "sliding_attention"] * 3
    assert [(kind.kind, kind.num_layers) for kind in time_stack(stage, rounds=1).kinds] == [
        ("sliding attention, dense", 2),
        ("full attention, dense", 2),
    ]


def test_layers_that_see_a_window_are_timed_with_more_cached_than_that(
    make_stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    pasts: set[int] = set()
    real = Stage.forward

    def forward(stage: Stage, items: Sequence[StageItem]) -> StageOutput:
        pasts.update(item.past for item in items)
        return real(stage, items)

    monkeypatch.setattr(Stage, "forward", forward)
    for capacity in (256, 4 * 21):
        stage = make_stage("test-mistral", kv_capacity_tokens=capacity)
        assert stage.sliding_window == 24
        assert [kind.kind for kind in time_stack(stage, rounds=1).kinds] == ["sliding attention, dense"]
    assert pasts == {24, 20}, "and with what the cache has room for where that is less"


def test_memory_of_a_loaded_stage_is_its_tensors_and_what_lies_around_them(make_stage: Callable[..., Stage]) -> None:
    before = LoadedMemory(CPU, memory_bytes=1e9)
    stage = make_stage(kv_capacity_tokens=20_000)

    use = before.use_of(stage, workspace_bytes=7.0)

    assert use.num_layers == 4
    assert use.weight_bytes == stage.weight_bytes
    assert use.kv_bytes_per_token_per_layer == 2 * 2 * 16 * 4, "keys and values of 2 heads of 16 float32"
    assert 0 <= use.overhead_bytes < 30e6
    assert use.workspace_bytes == 7.0
