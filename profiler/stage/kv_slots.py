"""Slots of a stage's KV cache: every request owns one contiguous extent of token slots.

An extent is as long as the request can become, so an admitted request never runs out. Extents are packed together when
free slots suffice but none of the holes is long enough: whatever the order of arrivals, ``capacity_tokens`` fit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec


class Extent(msgspec.Struct):
    """Token slots ``[offset, offset + length)``; ``offset`` changes when extents are packed."""

    offset: int
    length: int


class KvSlots(ABC):
    """Which slots each request owns. What the slots hold is the subclass's, which moves it when extents are packed."""

    def __init__(self, capacity_tokens: int) -> None:
        if capacity_tokens < 1:
            raise ValueError(f"capacity_tokens: need >= 1, got {capacity_tokens}")
        self.capacity_tokens = capacity_tokens
        self.used_tokens = 0  # slots that requests own
        self.peak_tokens = 0  # the most that they owned at once
        self._extents: dict[int, Extent] = {}  # request -> its slots

    @abstractmethod
    def _move(self, source: int, target: int, size: int) -> None:
        """Copy the content of ``size`` slots to a lower offset; the two ranges may overlap."""

    def reserve(self, request: int, length: int) -> Extent:
        """Give a request ``length`` slots of its own.

        Raises:
            ValueError: the request has slots already, or fewer than ``length`` are free: admission over-committed.
        """
        if request in self._extents:
            raise ValueError(f"request {request} has KV slots already")
        free = self.capacity_tokens - self.used_tokens
        if not 0 < length <= free:
            raise ValueError(f"request {request} wants {length} KV slots; {free} of {self.capacity_tokens} are free")
        offset = self._find_hole(length)
        if offset is None:
            self._pack()
            offset = self.used_tokens
        extent = Extent(offset, length)
        self._extents[request] = extent
        self.used_tokens += length
        self.peak_tokens = max(self.peak_tokens, self.used_tokens)
        return extent

    def release(self, request: int) -> None:
        """Free the request's slots; ``KeyError`` where it has none."""
        self.used_tokens -= self._extents.pop(request).length

    def rename(self, request: int, new: int) -> None:
        """The request's slots, and what they hold, belong to another one from now on; ``KeyError`` where it has none.

        Raises:
            ValueError: the other one has slots already.
        """
        if new in self._extents:
            raise ValueError(f"request {new} has KV slots already")
        self._extents[new] = self._extents.pop(request)

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
        """Move all extents to the front, in order, so that no move overwrites what has not moved yet."""
        start = 0
        for extent in sorted(self._extents.values(), key=lambda e: e.offset):
            if extent.offset != start:
                self._move(extent.offset, start, extent.length)
                extent.offset = start
            start += extent.length
