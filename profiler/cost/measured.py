"""What profiling a node gives: samples, the cost fitted to them, and how far the two can be trusted."""

from __future__ import annotations

import math

import msgspec

from helixbench.profiler.cost.model import BatchShape, StageCost


class CostSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One measured point: median seconds of an iteration and the relative spread (half the interquartile range).

    ``variation`` is the relative standard deviation of single iterations. ``device_median_s`` is the median by the
    device's own clock (CUDA events), where it has one. ``is_refined`` marks a point that was added where the fit was
    worst: the token term has a knot there.
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
    device_median_s: float | None = None
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


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How far a profile can be trusted.

    Attributes:
        drift: for each round after the first, the median over the points of its time over the first round's.
        discarded: blocks measured again, by the measured cause.
        num_refined: points added where the fit was worst.
        seconds: how long measuring took.
        memory: what a stage occupies.
    """

    drift: tuple[float, ...] = ()
    discarded: dict[str, int] = {}
    num_refined: int = 0
    seconds: float = 0.0
    memory: MemoryUse | None = None


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
