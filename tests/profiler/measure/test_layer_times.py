"""Every layer timed by marks, and its work counted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helixbench.profiler.measure.layer_times import (
    Batch,
    Marks,
    batches,
    layer_work,
    measure_layer_times,
)
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage.stage import Stage
from tests.conftest import ModelDir
from tests.greedy import load_whole

FAMILIES = ("test-llama", "test-gemma3", "test-mixtral")


def stages(files: ModelFiles) -> tuple[Stage, Stage, Stage]:
    last = files.num_layers - 1
    ranges = ((1, last), (0, 1), (last, last + 1))
    found = [
        Stage(files, start=start, end=end, kv_capacity_tokens=400, dtype=torch.float32, device=torch.device("cpu"))
        for start, end in ranges
    ]
    return found[0], found[1], found[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_of_each_kind_and_the_ends_are_timed(model_dir: ModelDir, family: str) -> None:
    files = ModelFiles(str(model_dir(family)))
    wanted = [Batch(4, 1, 31), Batch(1, 40, 0)]
    middle, first, last = stages(files)
    chosen: list[torch.Size] = []

    found = measure_layer_times(
        middle, first, last, files, wanted, choose=lambda logits: chosen.append(logits.shape), deadline=lambda: False
    )

    assert found.clock == "wall clock"
    assert found.copy_bytes_per_s > 0
    assert found.gemm_flops_per_s > 0
    for batch, iteration in zip(wanted, found.iterations, strict=True):
        assert (iteration.sequences, iteration.new_tokens, iteration.past_tokens) == batch
        assert 0 < iteration.layers_s < iteration.wall_s
        layers = [p for p in found.parts if p.part == "layer" and (p.sequences, p.new_tokens) == batch[:2]]
        assert sum(part.num_layers for part in layers) == middle.end - middle.start
        assert {part.kind for part in layers} == {layer_work(files, i).kind for i in range(middle.start, middle.end)}
    assert [part.part for part in found.parts if part.part != "layer"] == [
        "embedding", "head", "sampling", "embedding", "head", "sampling",
    ]  # fmt: skip
    assert all(part.median_s > 0 and part.num_bytes > 0 for part in found.parts)
    assert set(chosen) == {torch.Size((4, files.vocab_size)), torch.Size((1, files.vocab_size))}
    assert middle.kv.used_tokens == 0


def test_what_does_not_fit_the_time_is_left_out_but_for_the_first(model_dir: ModelDir) -> None:
    files = ModelFiles(str(model_dir("test-llama")))
    wanted = [Batch(4, 1, 31), Batch(1, 40, 0)]
    found = measure_layer_times(*stages(files), files, wanted, choose=lambda _: None, deadline=lambda: True)
    assert len(found.iterations) == 1


def test_a_stage_that_is_not_observed_marks_nothing(model_dir: ModelDir) -> None:
    files = ModelFiles(str(model_dir("test-llama")))
    middle, _, _ = stages(files)
    marks = Marks(middle.device)
    middle.mark_layers(marks)
    middle.mark_layers(None)
    measure_layer_times(*stages(files), files, [Batch(1, 1, 0)], choose=lambda _: None)
    assert marks.take() == {}


@pytest.mark.parametrize("family", ["test-llama", "test-qwen3", "test-gemma3"])
@pytest.mark.parametrize("batch", [Batch(1, 40, 0), Batch(1, 7, 20), Batch(1, 1, 30)])
def test_flops_are_those_that_torch_counts(model_dir: ModelDir, family: str, batch: Batch) -> None:
    """Of the layer's linear maps; those of attention are counted by hand, token by token."""
    files = ModelFiles(str(model_dir(family)))
    whole = load_whole(model_dir(family))
    work = layer_work(files, 0)
    layer = whole.model.layers[0]
    counted = FlopCounterMode(display=False)
    linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    with torch.inference_mode(), counted:
        for module in linears:
            module(torch.randn(1, batch.num_tokens, module.in_features))
    products = counted.get_total_flops()
    vectors = 2 * batch.num_tokens * sum(p.numel() for p in layer.parameters() if p.ndim == 1)
    seen = [min(batch.past_tokens + n + 1, work.window or 10**9) for n in range(batch.new_tokens)]
    attention = 4 * sum(seen) * work.num_heads * work.head_dim
    assert work.flops(batch) == products + vectors + attention


def test_bytes_of_experts_grow_with_the_tokens_that_choose_them(model_dir: ModelDir) -> None:
    work = layer_work(ModelFiles(str(model_dir("test-mixtral"))), 0)
    assert (work.experts, work.chosen, work.kind) == (4, 2, "4 experts")
    alone = work._replace(dense=0, num_kv_heads=0, hidden_size=0)
    assert alone.num_bytes(Batch(1, 1, 0), element_bytes=4) == pytest.approx(4 * work.routed / 2)
    assert alone.num_bytes(Batch(1000, 1, 0), element_bytes=4) == pytest.approx(4 * work.routed)
    assert alone.flops(Batch(10, 1, 0)) - 4 * 10 * work.num_heads * work.head_dim == 10 * work.routed


def test_batches_fit_what_is_given() -> None:
    found = batches(max_batch_tokens=64, max_context_tokens=512, max_kv_tokens=5000)
    assert all(b.num_tokens <= 64 and b.kv_tokens <= 5000 and b.past_tokens + b.new_tokens <= 512 for b in found)
    assert Batch(8, 1, 511) in found
    assert Batch(1, 64, 0) in found
    assert batches(max_batch_tokens=1, max_context_tokens=1, max_kv_tokens=1) == [Batch(1, 1, 0)]
    assert batches(max_batch_tokens=4096, max_context_tokens=4096, max_kv_tokens=100) == [Batch(1, 1, 0)]


class Cuda:
    """CUDA whose clock ticks 2 ms at every event."""

    def __init__(self) -> None:
        self.ticks = itertools.count(step=2)
        self.synchronized = 0

    def current_stream(self, _: Any) -> None:
        return None

    def synchronize(self, _: Any) -> None:
        self.synchronized += 1

    def Event(self, *, enable_timing: bool) -> Event:  # noqa: N802 - torch's name
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.at_ms = cuda, -1

    def record(self, _: Any) -> None:
        self.at_ms = next(self._cuda.ticks)

    def elapsed_time(self, other: Event) -> float:
        return other.at_ms - self.at_ms


def test_on_cuda_events_are_recorded_and_nothing_waits_before_the_end() -> None:
    cuda = Cuda()
    marks = Marks(torch.device("cuda"), cuda=cuda)
    for layer in (3, 4, 5):
        marks(layer)
    assert cuda.synchronized == 0
    assert marks.take() == {4: 0.002, 5: 0.002}
    assert cuda.synchronized == 1
    assert marks.take() == {}
    assert marks.name == "CUDA events"
