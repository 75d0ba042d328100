"""Where the time of a stage goes: every layer by the device's clock, and beside it what the device could do at most.

Work is counted, not measured: matrix products by the model's shapes, bytes by what an iteration has to read and write
if nothing is moved twice. So achieved bytes/s and flops/s are lower bounds of what the device did.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from helixbench.profiler.cost.measured import IterationTime, LayerTimes, PartTime
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.stage import Stage

DECODE_SEQUENCES = (1, 8, 64, 256)
DECODE_CONTEXTS = (128, 1024, 4096)
PREFILL_TOKENS = (128, 512, 2048)
ITERATIONS = 5
"""Of each batch, after one that warms up."""
ENOUGH_S = 1.0

ROOF_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
"""Of the copied tensor: far more than a processor caches."""
ROOF_ROWS = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the multiplied matrices."""


class Batch(NamedTuple):
    """Sequences that are alike."""

    sequences: int
    new_tokens: int  # of each
    past_tokens: int  # of each

    @property
    def num_tokens(self) -> int:
        """New tokens of all."""
        return self.sequences * self.new_tokens

    @property
    def kv_tokens(self) -> int:
        """KV slots of all."""
        return self.sequences * (self.new_tokens + self.past_tokens)


def batches(*, max_batch_tokens: int, max_context_tokens: int, max_kv_tokens: int) -> list[Batch]:
    """Decode by batch and context, and prefill by tokens, as far as they fit; there is always one of each."""
    decodes = [
        Batch(sequences, 1, context - 1)
        for sequences in DECODE_SEQUENCES
        for context in sorted({min(context, max_context_tokens) for context in DECODE_CONTEXTS})
    ]
    prefills = [
        Batch(1, tokens, 0)
        for tokens in sorted({min(tokens, max_batch_tokens, max_context_tokens) for tokens in PREFILL_TOKENS})
    ]
    fit = [b for b in decodes + prefills if b.num_tokens <= max_batch_tokens and b.kv_tokens <= max_kv_tokens]
    return list(dict.fromkeys(fit)) or [Batch(1, 1, 0)]


class Marks:
    """When each layer was over: CUDA events on the current stream, or the clock where the device is the processor.

    Args:
        device: that runs the layers.
        clock: of a processor.
        cuda: ``torch.cuda``, or what stands in for it.
    """

    def __init__(
        self, device: torch.device, *, clock: Callable[[], float] = time.perf_counter, cuda: Any = None
    ) -> None:
        self._device, self._clock = device, clock
        self._cuda = torch.cuda if cuda is None else cuda
        self._marks: list[tuple[int, Any]] = []  # (layer, event or seconds)

    @property
    def name(self) -> str:
        """What tells the time."""
        return "CUDA events" if self._device.type == "cuda" else "wall clock"

    def __call__(self, layer: int) -> None:
        """That layer is over."""
        if self._device.type != "cuda":
            self._marks.append((layer, self._clock()))
            return
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._device))
        self._marks.append((layer, event))

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""
        if self._device.type == "cuda":
            self._cuda.synchronize(self._device)

    def take(self) -> dict[int, float]:
        """Layer -> seconds since the layer before it was over; forgets all marks."""
        self.wait()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            found = {layer: before.elapsed_time(event) / 1e3 for (_, before), (layer, event) in pairs}
        else:
            found = {layer: at_s - before_s for (_, before_s), (layer, at_s) in pairs}
        self._marks = []
        return found


class LayerWork(NamedTuple):
    """What one layer has to do.

    ``dense`` and ``routed`` are elements of its weights that every token needs, and of all experts together, of which a
    token needs ``chosen`` of ``experts``.
    """

    dense: int
    routed: int
    experts: int
    chosen: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    hidden_size: int

    @property
    def kind(self) -> str:
        """Layers of one kind do the same work."""
        parts = [f"window {self.window}"] if self.window is not None else []
        parts += [f"{self.experts} experts"] if self.experts else []
        return ", ".join(parts)

    def flops(self, batch: Batch) -> float:
        """Two for each weight that a token needs, and four for each element of a head that it attends to."""
        weights = self.dense + (self.routed * self.chosen / self.experts if self.experts else 0)
        attended = sum(self._seen(batch.past_tokens + number + 1) for number in range(batch.new_tokens))
        return 2.0 * weights * batch.num_tokens + 4.0 * batch.sequences * attended * self.num_heads * self.head_dim

    def num_bytes(self, batch: Batch, *, element_bytes: int) -> float:
        """Weights and cached keys and values read once, those of the new tokens written, states read and written.

        Of experts, as many as that many tokens choose on average if each chooses at random.
        """
        weights = float(self.dense)
        if self.experts:
            weights += self.routed * (1 - (1 - self.chosen / self.experts) ** batch.num_tokens)
        read = batch.past_tokens + batch.new_tokens
        if self.window is not None:
            read = min(read, self.window + batch.new_tokens - 1)
        cached = 2 * self.num_kv_heads * self.head_dim * batch.sequences * (read + batch.new_tokens)
        return element_bytes * (weights + cached + 2 * self.hidden_size * batch.num_tokens)

    def _seen(self, position: int) -> int:
        """Tokens that the one at that place sees, itself included; the first place is 1."""
        return position if self.window is None else min(position, self.window)


def layer_work(files: ModelFiles, index: int) -> LayerWork:
    """Work of one layer, by the shapes of its weights: those of three dimensions are of experts."""
    architecture, config = files.architecture, files.config
    shapes = [architecture.shapes[name] for name in architecture.layers[index]]
    attention = architecture.attention[index]
    experts = [shape for shape in shapes if len(shape) == 3]
    num_experts = experts[0][0] if experts else 0
    chosen = int(getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k", None) or num_experts)
    return LayerWork(
        dense=sum(math.prod(shape) for shape in shapes if len(shape) != 3),
        routed=sum(math.prod(shape) for shape in experts),
        experts=num_experts,
        chosen=min(chosen, num_experts),
        num_heads=int(getattr(config, "num_attention_heads", attention.num_kv_heads)),
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        window=attention.window,
        hidden_size=files.hidden_size,
    )


def measure_layer_times(
    stage: Stage,
    first: Stage,
    last: Stage,
    files: ModelFiles,
    wanted: Sequence[Batch],
    *,
    choose: Callable[[torch.Tensor], object],
    deadline: Callable[[], bool] = lambda: False,
    marks: Marks | None = None,
) -> LayerTimes:
    """Time every layer of a stage, the embedding, the head and sampling.

    Args:
        stage: layers, whose KV cache is free.
        first: a stage that holds the embedding.
        last: one that holds the head.
        files: of the model.
        wanted: batches; the first is measured whatever happens.
        choose: draws a token for each row of logits [S, V], as serving does.
        deadline: asked before each batch but the first; when true the rest is left out.
        marks: timer of the layers.
    """
    marks = Marks(stage.device) if marks is None else marks
    parts: list[PartTime] = []
    iterations: list[IterationTime] = []
    rows_done, tokens_done = set[int](), set[int]()
    for number, batch in enumerate(wanted):
        if number and deadline():
            break
        found, iteration = _layers(stage, files, batch, marks)
        parts += found
        iterations.append(iteration)
        if batch.num_tokens not in tokens_done:
            tokens_done.add(batch.num_tokens)
            parts.append(_embedding(first, batch, marks))
        if batch.sequences not in rows_done:
            rows_done.add(batch.sequences)
            parts += _head_and_sampling(last, files, batch, marks, choose)
    copy_bytes_per_s, gemm_flops_per_s = roof(stage.device, stage.dtype, marks)
    return LayerTimes(
        clock=marks.name,
        copy_bytes_per_s=copy_bytes_per_s,
        gemm_flops_per_s=gemm_flops_per_s,
        parts=tuple(parts),
        iterations=tuple(iterations),
    )


def roof(device: torch.device, dtype: torch.dtype, marks: Marks) -> tuple[float, float]:
    """Bytes/s of one large copy, read and written, and flops/s of one large matrix product of that dtype.

    Smaller ones where the device, which holds a stage, has no memory for them.
    """
    count, rows = ROOF_BYTES[device.type] // dtype.itemsize, ROOF_ROWS[device.type]
    while True:
        try:
            return _roof(device, dtype, marks, count=count, rows=rows)
        except torch.OutOfMemoryError:
            if rows < 2:
                raise
        count, rows = count // 4, rows // 2


def _roof(device: torch.device, dtype: torch.dtype, marks: Marks, *, count: int, rows: int) -> tuple[float, float]:
    source = torch.ones(count, dtype=dtype, device=device)
    target = torch.empty_like(source)
    matrix = torch.ones((rows, rows), dtype=dtype, device=device)
    copy_s = _median_s(lambda: target.copy_(source), marks)
    product_s = _median_s(lambda: matrix @ matrix, marks)
    return 2 * count * dtype.itemsize / copy_s, 2 * rows**3 / product_s


def _layers(stage: Stage, files: ModelFiles, batch: Batch, marks: Marks) -> tuple[list[PartTime], IterationTime]:
    """Each kind of layer, and the whole forward pass."""
    for request in range(batch.sequences):
        stage.kv.reserve(request, batch.past_tokens + batch.new_tokens)
    hidden = torch.randn((batch.new_tokens, stage.hidden_size)).to(device=stage.device, dtype=stage.dtype)
    items = [
        StageItem(request, batch.past_tokens, batch.new_tokens, stage.start, False, hidden)
        for request in range(batch.sequences)
    ]
    walls: list[float] = []
    times: dict[int, list[float]] = {}  # layer -> its seconds
    stage.mark_layers(marks)
    try:
        for number in range(1 + ITERATIONS):
            marks.wait()
            begin = time.perf_counter()
            stage.forward(items)
            marks.wait()
            wall_s = time.perf_counter() - begin
            taken = marks.take()
            if number:  # the first warms up
                walls.append(wall_s)
                for layer, took_s in taken.items():
                    times.setdefault(layer, []).append(took_s)
    finally:
        stage.mark_layers(None)
        for request in range(batch.sequences):
            stage.kv.release(request)
    kinds: dict[LayerWork, list[float]] = {}  # work -> medians of the layers that do it
    for layer, values in times.items():
        kinds.setdefault(layer_work(files, layer), []).append(statistics.median(values))
    parts = [
        PartTime(
            part="layer",
            kind=work.kind,
            num_layers=len(medians),
            **batch._asdict(),
            median_s=statistics.fmean(medians),
            flops=work.flops(batch),
            num_bytes=work.num_bytes(batch, element_bytes=stage.dtype.itemsize),
        )
        for work, medians in kinds.items()
    ]
    layers_s = statistics.median(sum(values) for values in zip(*times.values(), strict=True))
    return parts, IterationTime(**batch._asdict(), wall_s=statistics.median(walls), layers_s=layers_s)


def _embedding(first: Stage, batch: Batch, marks: Marks) -> PartTime:
    """One row of the table read and written for each token."""
    ids = torch.randint(first.vocab_size, (batch.num_tokens,))
    return PartTime(
        part="embedding",
        **batch._asdict(),
        median_s=_median_s(lambda: first.embed(ids), marks),
        flops=0.0,
        num_bytes=2.0 * batch.num_tokens * first.hidden_size * first.dtype.itemsize,
    )


def _head_and_sampling(
    last: Stage, files: ModelFiles, batch: Batch, marks: Marks, choose: Callable[[torch.Tensor], object]
) -> list[PartTime]:
    rows, vocab = batch.sequences, files.vocab_size
    hidden = torch.randn((rows, last.hidden_size)).to(device=last.device, dtype=last.dtype)
    logits = last.head(hidden)
    head = PartTime(
        part="head",
        **batch._asdict(),
        median_s=_median_s(lambda: last.head(hidden), marks),
        flops=2.0 * rows * vocab * last.hidden_size,
        num_bytes=float(last.dtype.itemsize) * (vocab * last.hidden_size + rows * (last.hidden_size + vocab)),
    )
    sampling = PartTime(
        part="sampling",
        **batch._asdict(),
        median_s=_median_s(lambda: choose(logits), marks),
        flops=0.0,
        num_bytes=float(rows * vocab * logits.dtype.itemsize),
    )
    return [head, sampling]


def _median_s(run: Callable[[], object], marks: Marks) -> float:
    """Median seconds by the device's clock, after one that warms up; of fewer where they take ``ENOUGH_S``."""
    run()
    marks.wait()
    found: list[float] = []
    while len(found) < ITERATIONS and sum(found) < ENOUGH_S:
        marks(0)
        run()
        marks(1)
        found.append(marks.take()[1])
    return statistics.median(found)
