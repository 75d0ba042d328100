"""What profiling a node gives: samples, the cost fitted to them, and how far the two can be trusted."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from helixbench.profiler.cost.model import BatchShape, StageCost


class CostSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One measured point: median seconds of an iteration and the relative spread (half the interquartile range).

    ``variation`` is the relative standard deviation of single iterations. ``is_refined`` marks a point that
    was added where the fit was worst: the token term has a knot there.
    """

    num_layers: int
    first: bool
    last: bool
    batch: BatchShape
    median_s: float
    spread: float
    repeats: int
    held_out: bool
    variation: float = 0.0
    is_refined: bool = False

    @property
    def noise(self) -> float:
        """How far the median may lie off, relative: its spread, and no less than single iterations let expect.

        Three blocks may agree by chance. A block has two iterations at least.
        """
        return max(self.spread, self.variation / math.sqrt(2 * self.repeats))


class MemoryUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bytes of one loaded stage of ``num_layers`` layers, by what was allocated and by what the device says.

    Attributes:
        num_layers: layers held.
        weight_bytes: their tensors.
        kv_bytes_per_token_per_layer: the KV arena's size over its slots and layers.
        overhead_bytes: what the stage occupies beyond its tensors (rounding and caching of the allocator, libraries).
        workspace_bytes: peak beside all of that of the batches that need most memory (``grid.peak_points``).
        source: what said so.
    """

    num_layers: int
    weight_bytes: float
    kv_bytes_per_token_per_layer: float
    overhead_bytes: float
    workspace_bytes: float
    source: str


class PartTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What one part of a model took for one batch, by the device's clock: the median over iterations.

    Attributes:
        part: ``layer``, ``embedding``, ``head`` or ``sampling``.
        kind: of layers, what sets them apart from others; empty where all are alike.
        num_layers: that were timed; ``median_s`` is the mean of one of them.
        sequences: of the batch; the head and sampling have as many rows.
        new_tokens: of each sequence: 1 is decode, more is prefill.
        past_tokens: of each sequence, cached before.
        median_s: seconds.
        flops: of its matrix products, those of attention among them.
        num_bytes: that it has to read and write at least: weights, keys and values, states.
    """

    part: Literal["layer", "embedding", "head", "sampling"]
    kind: str = ""
    num_layers: int = 1
    sequences: int
    new_tokens: int
    past_tokens: int
    median_s: float
    flops: float
    num_bytes: float


class IterationTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One forward pass of the layers held: by the wall clock until the device is done, and the sum of its layers."""

    sequences: int
    new_tokens: int
    past_tokens: int
    wall_s: float
    layers_s: float


class LayerTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the time of a stage goes, part by part, beside what the device can do at most.

    ``clock`` is what timed the parts. ``copy_bytes_per_s`` counts what one large copy reads and writes,
    ``gemm_flops_per_s`` one large matrix product of the same dtype.
    """

    clock: str
    copy_bytes_per_s: float
    gemm_flops_per_s: float
    parts: tuple[PartTime, ...]
    iterations: tuple[IterationTime, ...]


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How far a profile can be trusted.

    Attributes:
        drift: for each round after the first, the median over the points of its time over the first round's.
        discarded: blocks measured again, by the measured cause.
        num_refined: points added where the fit was worst.
        seconds: how long measuring took.
        memory: what a stage occupies.
        layer_times: where its time goes.
    """

    drift: tuple[float, ...] = ()
    discarded: dict[str, int] = {}
    num_refined: int = 0
    seconds: float = 0.0
    memory: MemoryUse | None = None
    layer_times: LayerTimes | None = None


class MeasuredCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A node's fitted cost, the samples that it was fitted on, and how far it misses those kept out of the fit.

    ``held_out_error_median`` and ``held_out_error_p90`` are relative errors. ``source`` says what was timed.
    ``workspace_bytes`` is the memory that a node takes beside weights and KV cache, at the largest batch: the peak of
    an iteration and the allocator's overhead.
    """

    stage: StageCost
    samples: tuple[CostSample, ...]
    held_out_error_median: float
    held_out_error_p90: float
    workspace_bytes: float
    max_batch_tokens: int
    source: str
    quality: Quality | None = None
