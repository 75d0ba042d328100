"""How good a node's profile is, and what was measured beside the stage times: drift, cache, layers, memory."""

from __future__ import annotations

import msgspec

from helixbench.profiler.measure.processor_speed import ProcessorSpeed


class MemoryUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bytes of one loaded stage of ``num_layers`` layers, by what was allocated and by what the device says.

    Attributes:
        num_layers: layers held.
        weight_bytes: their tensors.
        kv_bytes_per_token_per_layer: the KV arena's size over its slots and layers.
        overhead_bytes: what the stage occupies beyond its tensors (rounding and caching of the allocator, libraries).
        workspace_bytes: peak of the batches that need most (``compute.peak_points``) beside all of that.
        source: what said so.
    """

    num_layers: int
    weight_bytes: float
    kv_bytes_per_token_per_layer: float
    overhead_bytes: float
    workspace_bytes: float
    source: str


class LayerKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Layers of one kind (attention, feed-forward): how many were timed alone, and the seconds of each."""

    kind: str
    num_layers: int
    median_s: float
    slowest_s: float


class StackTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One whole stack of layers against its parts, at one batch.

    Attributes:
        num_layers: layers of the stack.
        batch_tokens: decoding sequences in the batch.
        whole_s: an iteration of all layers.
        sum_of_layers_s: what the layers, each timed alone and in turn, add up to.
        one_repeated_s: one layer run as often as there are layers: its weights stay in the cache where they fit.
        kinds: the layers by kind.
        source: which clock.
    """

    num_layers: int
    batch_tokens: int
    whole_s: float
    sum_of_layers_s: float
    one_repeated_s: float
    kinds: tuple[LayerKind, ...]
    source: str

    @property
    def stack_ratio(self) -> float:
        """The whole over the sum of its layers: 1 where layers add up."""
        return self.whole_s / self.sum_of_layers_s

    @property
    def cold_hot_ratio(self) -> float:
        """The whole over one layer repeated: above 1 where weights have to be streamed from memory."""
        return self.whole_s / self.one_repeated_s


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What says how far a profile can be trusted.

    Attributes:
        drift: for each round after the first, the median over the points of its time over the first round's.
        discarded: blocks measured again, by the measured cause.
        num_refined: points added where the fit was worst.
        seconds: how long measuring took.
        stack: the stack against its layers.
        memory: what a stage occupies.
        processor_speed: mean while it was measured, where iterations are paced.
    """

    drift: tuple[float, ...] = ()
    discarded: dict[str, int] = {}
    num_refined: int = 0
    seconds: float = 0.0
    stack: StackTimes | None = None
    memory: MemoryUse | None = None
    processor_speed: ProcessorSpeed | None = None
