"""KV cache of a stage: one arena per stage, in which every request owns one contiguous extent of token slots.

An extent is as long as the request can become, so a request that was let in never runs out. Extents are packed together
when free slots suffice but none of the holes is long enough: whatever the order of arrivals, ``capacity`` tokens fit.
"""

from __future__ import annotations

import msgspec
import torch

from helixbench.profiler.stage.attention import MAX_GATHERED_SLOTS


class Extent(msgspec.Struct):
    """Token slots ``[offset, offset + length)``; ``offset`` moves when the arena is packed."""

    offset: int
    length: int


class KvCache:
    """Keys and values of ``num_layers`` layers.

    Axes of ``arena``: layer, key or value, KV head, token slot, head dimension  # [L, 2, H, C, D]
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        capacity_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if capacity_tokens < 1:
            raise ValueError(f"capacity_tokens: need >= 1, got {capacity_tokens}")
        self.capacity_tokens = capacity_tokens
        self.arena = torch.zeros(
            (num_layers, 2, num_kv_heads, capacity_tokens, head_dim), dtype=dtype, device=device
        )  # [L, 2, H, C, D]
        self._extents: dict[int, Extent] = {}  # request -> its slots
        self.peak_tokens = 0

    @property
    def used_tokens(self) -> int:
        """Slots that requests own."""
        return sum(extent.length for extent in self._extents.values())

    def reserve(self, request: int, length: int) -> Extent:
        """Give a request ``length`` slots of its own.

        Raises:
            ValueError: the request has slots already, or fewer than ``length`` are free: admission over-committed.
        """
        if request in self._extents:
            raise ValueError(f"request {request} has KV slots already")
        used = self.used_tokens
        if not 0 < length <= self.capacity_tokens - used:
            free = self.capacity_tokens - used
            raise ValueError(f"request {request} wants {length} KV slots; {free} of {self.capacity_tokens} are free")
        offset = self._find_hole(length)
        if offset is None:
            self._pack()
            offset = used
        extent = Extent(offset, length)
        self._extents[request] = extent
        self.peak_tokens = max(self.peak_tokens, used + length)
        return extent

    def release(self, request: int) -> None:
        """Free the request's slots; ``KeyError`` where it has none."""
        del self._extents[request]

    def extent(self, request: int) -> Extent:
        """The request's slots; ``KeyError`` where it has none."""
        return self._extents[request]

    def _find_hole(self, length: int) -> int | None:
        start = 0
        for extent in sorted(self._extents.values(), key=lambda e: e.offset):
            if extent.offset - start >= length:
                return start
            start = extent.offset + extent.length
        return start if self.capacity_tokens - start >= length else None

    def _pack(self) -> None:
        """Move all extents to the front, in order.

        Source and target of a move may overlap, hence a copy: of no more slots of one layer than an iteration copies,
        for there is no room for more. Pieces go from the front, so none is overwritten before it has moved.
        """
        start = 0
        for extent in sorted(self._extents.values(), key=lambda e: e.offset):
            if extent.offset != start:
                for layer in self.arena:  # [2, H, C, D]
                    for done in range(0, extent.length, MAX_GATHERED_SLOTS):
                        size = min(MAX_GATHERED_SLOTS, extent.length - done)
                        source, target = extent.offset + done, start + done
                        layer[:, :, target : target + size] = layer[:, :, source : source + size].clone()
                extent.offset = start
            start += extent.length
