"""The steps of a check of a device. Each runs in a process of its own, so that none ends or outlasts the check.

On a CPU they run the same code on small models: their logic is what is checked there.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helixbench.errors import MeasurementError
from helixbench.reference_server.device_check.record import Found

if TYPE_CHECKING:
    import torch

    from helixbench.profiler.stage.stage import Stage

TOLERANCE_FLOAT32 = 1e-3
"""Largest accepted difference of logits in float32."""
BFLOAT16_RATIO = 1.5
"""A stage's logits in bfloat16 may be so much farther from those in float32 than transformers' own are."""
PROMPT_LENGTHS = (3, 30, 70)
NEW_TOKENS = 12
DECODES = tuple((sequences, context) for sequences in (1, 8, 64, 256) for context in (128, 1000, 4000))
CPU_KV_TOKENS = 9000
KV_SHARE = 0.5
"""Of the free memory, for the KV cache of the large shape."""
MOST_ERROR = 0.05
"""Of measured tokens/s against expected ones, and of memory that a stage leaves behind."""


class Step(NamedTuple):
    """One step: what it does on a device with a folder of its own, and the seconds after which it is stopped."""

    run: Callable[[torch.device, Path], Found]
    proves: str
    limit_s: float


def facts(device: torch.device, folder: Path) -> Found:  # noqa: ARG001
    """What the device is."""
    import torch

    if device.type != "cuda":
        return Found(f"{device}, torch {torch.__version__}", {"threads": torch.get_num_threads()})
    properties = torch.cuda.get_device_properties(device)
    return Found(
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"torch {torch.__version__}, CUDA {torch.version.cuda}",
        {"memory_bytes": float(properties.total_memory), "multiprocessors": float(properties.multi_processor_count)},
    )


def roof(device: torch.device, folder: Path) -> Found:  # noqa: ARG001
    """One large copy, and one large matrix product of each dtype."""
    import torch

    from helixbench.profiler.measure.layer_times import Marks
    from helixbench.profiler.measure.layer_times import roof as measured

    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        figures[f"copy_{name}_bytes_per_s"], figures[f"gemm_{name}_flops_per_s"] = measured(
            device, dtype, Marks(device)
        )
    return Found(
        f"copy {figures['copy_bfloat16_bytes_per_s'] / 1e9:.4g} GB/s, "
        f"GEMM {figures['gemm_bfloat16_flops_per_s'] / 1e12:.4g} TFLOP/s in bfloat16, "
        f"{figures['gemm_float32_flops_per_s'] / 1e12:.4g} in float32",
        figures,
    )


def families(device: torch.device, folder: Path) -> Found:
    """Every family: greedy tokens in float32 as ``generate`` gives them, and logits in bfloat16."""
    from helixbench.profiler.model.presets import PRESETS
    from helixbench.profiler.model.synthetic import make_model

    names = [name for name in PRESETS if name.startswith("test-")]
    worst = 0.0
    for name in names:
        make_model(folder / name, preset=name)
        worst = max(worst, _compare_family(folder / name, device))
    return Found(f"{len(names)} families, the largest error in float32 {worst:.2g}", {"worst_float32": worst})


def _compare_family(directory: Path, device: torch.device) -> float:
    """The largest difference of logits in float32.

    Raises:
        MeasurementError: tokens or logits differ by more than rounding.
    """
    import torch

    rng = random.Random(0)
    prompts = [[rng.randrange(0x20, 0x7F) for _ in range(length)] for length in PROMPT_LENGTHS]
    whole = _transformers(directory, torch.float32, device)
    with torch.inference_mode():
        outputs = [
            whole.generate(
                torch.tensor([prompt], device=device), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
            )[0].tolist()
            for prompt in prompts
        ]
        true = [whole(torch.tensor([output], device=device)).logits[0].float() for output in outputs]
    found = _stage_logits(directory, torch.float32, device, prompts, outputs)
    worst = max(_difference(*pair) for pair in zip(found, true, strict=True))
    if not worst < TOLERANCE_FLOAT32:
        raise MeasurementError(f"{directory.name}: logits in float32 differ by {worst:.3g}")
    for prompt, output, logits in zip(prompts, outputs, found, strict=True):
        chosen = logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
        for place, (token, expected) in enumerate(zip(chosen, output[len(prompt) :], strict=True)):
            row = logits[len(prompt) - 1 + place]
            if float(row[token] - row[expected]) > TOLERANCE_FLOAT32:
                raise MeasurementError(f"{directory.name}: token {place} is {token}, and {expected} by generate")
    half = _transformers(directory, torch.bfloat16, device)
    with torch.inference_mode():
        theirs = [half(torch.tensor([output], device=device)).logits[0].float() for output in outputs]
    ours = _stage_logits(directory, torch.bfloat16, device, prompts, outputs)
    their_error, our_error = (
        float(torch.cat([(a - b).abs().flatten() for a, b in zip(each, true, strict=True)]).mean())
        for each in (theirs, ours)
    )
    if our_error > BFLOAT16_RATIO * their_error:
        raise MeasurementError(
            f"{directory.name}: logits in bfloat16 are {our_error:.3g} off on average, those of transformers "
            f"{their_error:.3g}"
        )
    return worst


def _transformers(directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    # transformers before 5.24 runs Gemma 2 with an attention function that leaves out its cap of the scores
    caps = getattr(AutoConfig.from_pretrained(directory), "attn_logit_softcapping", None) is not None
    options = {"attn_implementation": "eager"} if caps else {}
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).to(device).eval()
    model.generation_config.eos_token_id = None
    return model


def _stage_logits(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    prompts: Sequence[list[int]],
    outputs: Sequence[list[int]],
) -> list[torch.Tensor]:
    """Logits [N, V] of each sequence by one stage: prompts in two chunks, then all sequences decode as one batch."""
    import torch

    from helixbench.profiler.model.files import ModelFiles
    from helixbench.profiler.stage.batch import StageItem
    from helixbench.profiler.stage.stage import Stage

    files = ModelFiles(str(directory))
    kv_tokens = sum(map(len, outputs))
    stage = Stage(files, start=0, end=files.num_layers, kv_capacity_tokens=kv_tokens, dtype=dtype, device=device)
    rows: list[list[torch.Tensor]] = [[] for _ in outputs]
    for request, output in enumerate(outputs):
        stage.kv.reserve(request, len(output))
    done = [0] * len(outputs)

    def run(sizes: Sequence[int]) -> None:
        items = [
            StageItem(n, done[n], size, 0, True, torch.tensor(outputs[n][done[n] : done[n] + size], dtype=torch.int32))
            for n, size in enumerate(sizes)
        ]
        hidden = stage.forward(items).hidden
        logits = stage.head(hidden).float()
        for n, part in enumerate(torch.split(logits, list(sizes))):
            rows[n].append(part)
            done[n] += sizes[n]

    run([1 + len(prompt) // 3 for prompt in prompts])
    run([len(prompt) - 1 - len(prompt) // 3 for prompt in prompts])
    for _ in range(NEW_TOKENS):
        run([1] * len(outputs))
    return [torch.cat(parts) for parts in rows]


def _difference(found: torch.Tensor, true: torch.Tensor) -> float:
    """NaN counts as infinitely far."""
    return float((found - true).abs().nan_to_num(nan=float("inf")).max())


def sampling(device: torch.device, folder: Path) -> Found:  # noqa: ARG001
    """Drawn tokens on the device are those that the CPU draws from the same logits."""
    import torch

    from helixbench.reference_server.node.token_sampling import Draw, sample
    from helixbench.solver.scheduling.work import SamplingParams

    logits = torch.randn((256, 32_000), generator=torch.Generator().manual_seed(0)) * 2
    kinds = (
        SamplingParams(),
        SamplingParams(1.0),
        SamplingParams(0.8, 0.9),
        SamplingParams(1.0, top_k=50),
        SamplingParams(1.0, min_p=0.1),
    )
    draws = [Draw(kinds[row % len(kinds)], row, row) for row in range(len(logits))]
    here = sample(logits, draws)
    there = logits.to(device)
    tokens = sample(there, draws).cpu()  # the first call also loads kernels
    begin = time.perf_counter()
    sample(there, draws).cpu()
    took_s = time.perf_counter() - begin
    different = int((tokens != here).sum())
    if different > 1:  # one draw of 256 may fall on a border that rounding moves
        raise MeasurementError(f"{different} of {len(draws)} tokens are not those that the CPU draws")
    return Found(f"{len(draws)} rows of 32000 logits in {took_s * 1e3:.3g} ms", {"rows_s": took_s})


def shape(device: torch.device, folder: Path) -> Found:
    """Layers of an 8 B shape: time, bytes/s, kernel launches and waits of the host for each iteration."""
    from helixbench.profiler.measure.layer_times import Batch, measure_layer_times
    from helixbench.profiler.model.files import ModelFiles

    is_cuda = device.type == "cuda"
    _make_shape(folder / "shape", device)
    files = ModelFiles(str(folder / "shape"))
    begin = time.perf_counter()
    middle, first, last = _three_stages(files, device)
    load_s = time.perf_counter() - begin
    wanted = [
        Batch(sequences, 1, context - 1) for sequences, context in DECODES if is_cuda or sequences * context < 9000
    ]
    fit = [batch for batch in wanted if batch.kv_tokens <= middle.kv.capacity_tokens]
    times = measure_layer_times(middle, first, last, files, fit, choose=lambda logits: logits.argmax(dim=-1).tolist())
    figures = {"load_s": load_s, "left_out": float(len(wanted) - len(fit))}
    best = 0.0
    for part in times.parts:
        if part.part == "layer":
            name = f"layer_{part.sequences}x{part.past_tokens + 1}"
            share = part.num_bytes / part.median_s / times.copy_bytes_per_s
            figures |= {f"{name}_s": part.median_s, f"{name}_share_of_copy": share}
            best = max(best, share)
    counts = _counts(middle, fit[0])
    figures |= counts
    kernels = f", {counts['launches']:.0f} launches and {counts['waits']:.0f} waits an iteration" if is_cuda else ""
    return Found(
        f"{middle.end - middle.start} layers timed; decode reaches {best:.0%} of the copy's bytes/s at best{kernels}; "
        f"{len(wanted) - len(fit)} batches left out for want of memory",
        figures,
    )


def _make_shape(directory: Path, device: torch.device) -> None:
    """Eight layers of Llama-3-8B's shape with random weights in bfloat16; on a CPU much smaller ones in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    is_cuda = device.type == "cuda"
    config = LlamaConfig(
        num_hidden_layers=8,
        hidden_size=4096 if is_cuda else 128,
        intermediate_size=14336 if is_cuda else 448,
        num_attention_heads=32 if is_cuda else 8,
        num_key_value_heads=8 if is_cuda else 2,
        vocab_size=128_256 if is_cuda else 512,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16 if is_cuda else torch.float32)
    model.save_pretrained(directory)


def _three_stages(files: Any, device: torch.device) -> tuple[Stage, Stage, Stage]:
    """All but the first and the last layer, the first, and the last."""
    import torch

    from helixbench.profiler.model.dtypes import torch_dtype
    from helixbench.profiler.stage.stage import Stage

    dtype = torch_dtype(files.saved_dtype)
    layer_token_bytes = files.facts(dtype=files.saved_dtype).kv_bytes_per_token_per_layer
    layers = files.num_layers - 2
    kv_tokens = max(sequences * context for sequences, context in DECODES) if device.type == "cuda" else CPU_KV_TOKENS
    if device.type == "cuda":
        weights = files.num_layers * files.facts(dtype=files.saved_dtype).layer_weight_bytes
        free = torch.cuda.mem_get_info(device)[0] - weights
        kv_tokens = min(kv_tokens, int(KV_SHARE * free / (layers * layer_token_bytes)))
    ranges = ((1, files.num_layers - 1, kv_tokens), (0, 1, 1), (files.num_layers - 1, files.num_layers, 1))
    middle, first, last = (
        Stage(files, start=start, end=end, kv_capacity_tokens=tokens, dtype=dtype, device=device)
        for start, end, tokens in ranges
    )
    return middle, first, last


def _counts(stage: Stage, batch: Any) -> dict[str, float]:
    """Kernel launches and waits of the host for the device in one iteration, as torch's profiler counts them."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from helixbench.profiler.stage.batch import StageItem

    hidden = torch.zeros((1, stage.hidden_size), dtype=stage.dtype, device=stage.device)
    items = [StageItem(n, batch.past_tokens, 1, stage.start, False, hidden) for n in range(batch.sequences)]
    for n in range(batch.sequences):
        stage.kv.reserve(n, batch.kv_tokens // batch.sequences)
    stage.forward(items)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if stage.device.type == "cuda" else [])
    with profile(activities=activities) as run:
        stage.forward(items)
    for n in range(batch.sequences):
        stage.kv.release(n)
    names = [(event.key, event.count) for event in run.key_averages()]
    return {
        "launches": float(sum(count for name, count in names if "LaunchKernel" in name)),
        "waits": float(sum(count for name, count in names if "Synchronize" in name or name == "aten::item")),
        "attention_calls": float(sum(count for name, count in names if name.startswith("aten::_scaled_dot_product"))),
    }


def memory(device: torch.device, folder: Path) -> Found:
    """A stage that is dropped gives its memory back, and another one can be loaded."""
    import gc

    import torch

    from helixbench.profiler.model.files import ModelFiles

    _make_shape(folder / "shape", device)
    files = ModelFiles(str(folder / "shape"))

    def used() -> float:
        gc.collect()
        if device.type != "cuda":
            return 0.0
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return float(total - free)

    stages = _three_stages(files, device)
    held = sum(stage.weight_bytes + stage.kv.arena.nbytes for stage in stages)
    del stages
    before = used()
    stages = _three_stages(files, device)
    with_stage = used()
    del stages
    after = used()
    if device.type != "cuda":
        return Found("loaded, dropped and loaded again; a CPU does not say what came back", {"tensor_bytes": held})
    figures = {"tensor_bytes": held, "device_bytes": with_stage - before, "left_bytes": after - before}
    if abs(figures["left_bytes"]) > MOST_ERROR * held:
        raise MeasurementError(f"{figures['left_bytes'] / 1e6:.0f} MB did not come back of {held / 1e6:.0f} MB")
    return Found(
        f"tensors {held / 1e9:.3g} GB, {figures['device_bytes'] / 1e9:.3g} GB by the device, "
        f"{figures['left_bytes'] / 1e6:.0f} MB left behind",
        figures,
    )


def promise(device: torch.device, folder: Path) -> Found:
    """Profile the device as a node, plan one node, serve the plan, and compare."""
    from helixbench.records import load_record
    from helixbench.reference_server.run_log import RunLog

    load = ("--prompt-tokens", "64", "--output-tokens", "32", "--concurrency", "16")
    memory_line = "" if device.type == "cuda" else 'memory = "1GB"\n'
    (folder / "bed.toml").write_text(f'[[node]]\nname = "node"\ndevice = "{device}"\n{memory_line}')
    place = ("--model", "model", "--testbed", "bed.toml")
    preset = "tiny" if device.type == "cuda" else "nano"
    for words in (
        ("model", "make", "model", "--preset", preset),
        ("profile", *place, "--budget-s", "45" if device.type == "cuda" else "10", "-o", "cluster.json"),
        ("solve", "cluster.json", *load, "--time-limit-s", "5", "-o", "plan.json"),
        ("bench", "plan.json", *place, *load, "--requests", "64", "-o", "run.json"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "helixbench", *words], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise MeasurementError(f"helixbench {' '.join(words)}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    run = load_record(folder / "run.json", RunLog)
    (expected,) = (entry for entry in run.plan.predicted.expected if entry.concurrency == run.concurrency)
    ratio = run.total_tokens_per_s / expected.total_tokens_per_s
    found = Found(
        f"measured {run.total_tokens_per_s:.4g} tokens/s = {ratio:.3f} x expected", {"measured_over_expected": ratio}
    )
    if device.type == "cuda" and not abs(ratio - 1) <= MOST_ERROR:
        raise MeasurementError(f"{found.says}; within {MOST_ERROR:.0%} was wanted")
    return found


STEPS: dict[str, Step] = {
    "facts": Step(facts, "torch reaches the device", 60),
    "roof": Step(roof, "what the device can do at most", 60),
    "families": Step(families, "tokens and logits of every family are those of transformers", 180),
    "sampling": Step(sampling, "seeded tokens do not depend on the device", 60),
    "shape": Step(shape, "what a layer takes, and how near that is to what the device can do", 180),
    "memory": Step(memory, "memory comes back when a stage is dropped", 120),
    "promise": Step(promise, "one node delivers what is expected of it", 240),
}
