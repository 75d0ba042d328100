from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helixbench.errors import InputError
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage.batch import StageItem
from tests.conftest import ModelDir
from tests.greedy import FAMILIES, load_whole
from tests.profiler.stage.schedules import (
    Part,
    Route,
    chunks_then_decodes,
    distances,
    random_sequences,
    run_schedule,
    stage_of,
    whole_logits,
)

LOGITS_TOLERANCE = 1e-4  # float32, absolute
# bfloat16 keeps 8 bits, so a stage and transformers round differently at every step; neither may be much farther from
# the float32 logits than the other.
BFLOAT16_RATIO = 1.5
LENGTHS = (1, 2, 23, 24, 25, 26, 60)  # around the smallest sliding window, and far beyond it


@pytest.mark.parametrize("gather_up_to", [0, 10**6])
@pytest.mark.parametrize("preset", FAMILIES)
def test_logits_equal_the_whole_models(model_dir: ModelDir, preset: str, gather_up_to: int) -> None:
    directory = model_dir(preset)
    sequences = random_sequences(LENGTHS)
    stage = stage_of(directory, gather_up_to=gather_up_to)

    found = run_schedule([[(stage, 0)]] * len(sequences), sequences, chunks_then_decodes(LENGTHS, chunk=11, decodes=14))
    whole = whole_logits(load_whole(directory), sequences)

    assert len(found) > 80
    assert distances(found, whole).max() < LOGITS_TOLERANCE
    shifted = [torch.roll(logits, 1, dims=0) for logits in whole]
    assert distances(found, shifted).median() > 1, "logits that differ this little between positions prove nothing"


@pytest.mark.parametrize("gather_up_to", [0, 10**6])
@pytest.mark.parametrize("preset", FAMILIES)
def test_sequences_may_enter_late_beside_others(model_dir: ModelDir, preset: str, gather_up_to: int) -> None:
    directory = model_dir(preset)
    sequences = random_sequences(LENGTHS)
    short, long, last = (
        stage_of(directory, start, end, gather_up_to=gather_up_to) for start, end in ((0, 2), (0, 5), (2, 6))
    )
    ways: list[Route] = [[(short, 0), (last, 2)], [(long, 0), (last, 5)]]

    found = run_schedule(
        [ways[number % 2] for number in range(len(sequences))],
        sequences,
        chunks_then_decodes(LENGTHS, chunk=7, decodes=9),
    )

    assert distances(found, whole_logits(load_whole(directory), sequences)).max() < LOGITS_TOLERANCE


def test_first_stage_runs_requests_that_enter_at_each_of_its_layers(model_dir: ModelDir) -> None:
    """One batch of one stage with token ids at layer 0 and hidden states at layers 1 and 3."""
    directory = model_dir("test-qwen3")
    sequences = random_sequences((12, 9, 10))
    one, three, whole = stage_of(directory, 0, 1), stage_of(directory, 0, 3), stage_of(directory)

    found = run_schedule(
        [[(one, 0), (whole, 1)], [(three, 0), (whole, 3)], [(whole, 0)]],
        sequences,
        [[(0, 5), (1, 8), (2, 10)], [(0, 7), (1, 1)]],
    )

    assert distances(found, whole_logits(load_whole(directory), sequences)).max() < LOGITS_TOLERANCE


@pytest.mark.parametrize("preset", FAMILIES)
def test_several_chunks_of_one_sequence_in_one_batch(model_dir: ModelDir, preset: str) -> None:
    directory = model_dir(preset)
    sequences = random_sequences((40, 30))
    stage = stage_of(directory)

    found = run_schedule(
        [[(stage, 0)]] * 2, sequences, [[(0, 10), (1, 5), (0, 9), (0, 1)], [(1, 24), (0, 3), (1, 1), (0, 17)]]
    )

    assert distances(found, whole_logits(load_whole(directory), sequences)).max() < LOGITS_TOLERANCE


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[int], list[list[Part]]]:
    """Any lengths, cut into any parts, in any batches; parts of a sequence stay in order."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    left = list(lengths)
    schedule = []
    while any(left):
        batch: list[Part] = []
        for _ in range(draw(st.integers(1, 6))):
            open_ones = [n for n, tokens in enumerate(left) if tokens]
            if open_ones:
                number = draw(st.sampled_from(open_ones))
                size = draw(st.sampled_from([size for size in (1, 2, 7, 30) if size <= left[number]]))
                batch.append((number, size))
                left[number] -= size
        schedule.append(batch)
    return lengths, schedule


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=schedules(), gather_up_to=st.sampled_from((0, 12, 10**6)), cut=st.integers(1, 5), late=st.integers(0, 4))
def test_any_schedule_over_any_cut_gives_the_same_logits(
    model_dir: ModelDir, plan: tuple[list[int], list[list[Part]]], gather_up_to: int, cut: int, late: int
) -> None:
    lengths, schedule = plan
    directory = model_dir("test-mistral")
    sequences = random_sequences(lengths)
    first = stage_of(directory, 0, cut, gather_up_to=gather_up_to)
    last = stage_of(directory, max(0, cut - late), 6, gather_up_to=gather_up_to)

    found = run_schedule([[(first, 0), (last, cut)]] * len(sequences), sequences, schedule)

    assert distances(found, whole_logits(load_whole(directory), sequences)).max() < LOGITS_TOLERANCE


@pytest.mark.parametrize("preset", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_transformers_own(model_dir: ModelDir, preset: str) -> None:
    directory = model_dir(preset)
    sequences = random_sequences(LENGTHS)
    stage = stage_of(directory, dtype=torch.bfloat16)
    exact = whole_logits(load_whole(directory), sequences)

    found = run_schedule([[(stage, 0)]] * len(sequences), sequences, chunks_then_decodes(LENGTHS, chunk=11, decodes=14))
    rounded = whole_logits(load_whole(directory, torch.bfloat16), sequences)
    own = {(n, position): rounded[n][position] for n, position in found}

    assert distances(found, exact).mean() < BFLOAT16_RATIO * distances(own, exact).mean()
    assert distances(found, exact).median() < 1 < distances(found, [torch.roll(x, 1, dims=0) for x in exact]).median()


def test_only_sequences_that_sample_give_logits(model_dir: ModelDir) -> None:
    stage = stage_of(model_dir("test-llama"))
    first, second, third = random_sequences((4, 6, 3))
    for number, sequence in enumerate((first, second, third)):
        stage.kv.reserve(number, len(sequence))

    output = stage.forward(
        [
            StageItem(0, 0, 4, 0, True, first),
            StageItem(1, 0, 5, 0, False, second[:5]),
            StageItem(2, 0, 3, 0, True, third),
        ]
    )
    none = stage.forward([StageItem(1, 5, 1, 0, False, second[5:])])

    assert output.logits is not None
    assert torch.equal(output.logits, stage.head(output.hidden[[3, 11]]))
    whole = whole_logits(load_whole(model_dir("test-llama")), (first, third))
    assert torch.allclose(output.logits, torch.stack([whole[0][-1], whole[1][-1]]), atol=LOGITS_TOLERANCE)
    assert none.logits is not None
    assert none.logits.shape == (0, stage.vocab_size)


def test_packing_the_cache_between_batches_changes_nothing(model_dir: ModelDir) -> None:
    stage = stage_of(model_dir("test-llama"), kv_capacity_tokens=48)
    sequence = random_sequences((20,))[0]
    stage.kv.reserve(7, 10)
    stage.kv.reserve(0, 20)
    offset = stage.kv.extent(0).offset
    stage.forward([StageItem(0, 0, 12, 0, True, sequence[:12])])
    stage.kv.release(7)
    stage.kv.reserve(8, 28)
    output = stage.forward([StageItem(0, 12, 8, 0, True, sequence[12:])])

    assert stage.kv.extent(0).offset != offset, "nothing was packed"
    assert output.logits is not None
    whole = whole_logits(load_whole(model_dir("test-llama")), [sequence])[0]
    assert torch.allclose(output.logits[0], whole[-1], atol=LOGITS_TOLERANCE)


@pytest.mark.parametrize(("start", "end"), [(0, 7), (6, 6), (3, 2), (-1, 2)])
def test_range_outside_the_model_is_refused(model_dir: ModelDir, start: int, end: int) -> None:
    with pytest.raises(InputError, match=r"the model has layers \[0,6\)"):
        stage_of(model_dir("test-llama"), start, end)


def test_tensors_of_another_shape_are_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    directory = tmp_path / "wrong"
    shutil.copytree(model_dir("test-llama"), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))

    with pytest.raises(InputError, match=r"has the shape \[64, 128\], but config\.json asks for \[64, 96\]"):
        stage_of(directory, 2, 3)


# What a stage holds


def loaded_tensors(directory: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[[], object]) -> set[str]:
    """Names of the tensors whose contents were read meanwhile."""
    names: set[str] = set()
    real = safetensors.safe_open

    class Recorder:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._opened = real(*arguments, **options)

        def __enter__(self) -> Recorder:
            self._opened.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._opened.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self._opened.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            names.add(name)
            return self._opened.get_tensor(name)  # type: ignore[no-any-return]

    with monkeypatch.context() as patched:
        patched.setattr(safetensors, "safe_open", Recorder)
        build()
    return names


@pytest.mark.parametrize(
    ("preset", "start", "end", "ends"),
    [
        ("test-llama", 0, 2, {"model.embed_tokens.weight"}),
        ("test-llama", 2, 4, set()),
        ("test-llama", 4, 6, {"model.norm.weight", "lm_head.weight"}),
        ("test-qwen3", 0, 1, {"model.embed_tokens.weight"}),
        ("test-qwen3", 5, 6, {"model.norm.weight", "model.embed_tokens.weight"}),
    ],
)
def test_only_the_ranges_own_tensors_are_read(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch, preset: str, start: int, end: int, ends: set[str]
) -> None:
    directory = model_dir(preset)
    own = {name for names in ModelFiles(str(directory)).architecture.layers[start:end] for name in names}

    assert loaded_tensors(directory, monkeypatch, lambda: stage_of(directory, start, end)) == own | ends


def test_weight_bytes_are_those_of_the_tensors_held(model_dir: ModelDir) -> None:
    directory = model_dir("test-qwen2")
    whole = load_whole(directory)

    parts = [stage_of(directory, start, end).weight_bytes for start, end in ((0, 2), (2, 6))]
    embedding_bytes = whole.model.embed_tokens.weight.numel() * 4

    assert stage_of(directory).weight_bytes == sum(p.numel() * 4 for p in whole.parameters()), "tied head counts once"
    assert sum(parts) == stage_of(directory).weight_bytes + embedding_bytes, "both ends of a cut model hold it"
    assert stage_of(directory, dtype=torch.bfloat16).weight_bytes * 2 == stage_of(directory).weight_bytes


RESIDENT = """
import gc, json, os, sys
import torch
from helixbench.profiler.measure.memory import resident_bytes
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage.stage import Stage

def peak_bytes():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

def build(start, end):
    return Stage(ModelFiles(sys.argv[1]), start=start, end=end, kv_capacity_tokens=1, dtype=torch.float32,
                 device=torch.device("cpu"))

torch.set_num_threads(1)
build(3, 4)  # libraries and code come into memory now
gc.collect()
for start, end in ((4, 5), (4, 8), (0, 16)):
    child = os.fork()  # each stage in a process of its own, which ends with its stage
    if child == 0:
        open("/proc/self/clear_refs", "w").write("5")
        before = resident_bytes()
        stage = build(start, end)
        print(json.dumps([end - start, stage.weight_bytes, resident_bytes() - before, peak_bytes() - before]),
              flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
MEGABYTE = 1_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_resident_memory_of_a_stage_is_that_of_its_layers(model_dir: ModelDir) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(model_dir("tiny"))], capture_output=True, text=True, check=True
    )
    resident = {
        layers: (weights, rss, peak) for layers, weights, rss, peak in map(json.loads, done.stdout.split("\n")[:-1])
    }
    layer_bytes = resident[1][0]

    assert list(resident) == [1, 4, 16]
    assert layer_bytes == pytest.approx(11.8 * MEGABYTE, rel=0.01)
    for layers, (weights, rss, peak) in resident.items():
        more_layers = (layers - 1) * layer_bytes
        ends = weights - layers * layer_bytes
        assert 0 <= ends < 1.5 * MEGABYTE  # the whole model holds embedding and head, too
        # What every child adds beside its weights is the same, so it goes out in the difference.
        assert rss - resident[1][1] == pytest.approx(more_layers + ends, abs=3 * MEGABYTE)
        assert peak - rss < 2 * layer_bytes, "more was read than is held"


def test_schedule_helper_covers_all_tokens() -> None:
    """The schedules above are made by hand; a sequence left half run would hide errors."""
    draw = random.Random(0)
    lengths = [draw.randrange(1, 50) for _ in range(20)]
    schedule = chunks_then_decodes(lengths, chunk=11, decodes=14)

    totals = [sum(size for n, size in itertools.chain(*schedule) if n == number) for number in range(20)]
    assert totals == lengths
