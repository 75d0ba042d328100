"""Kept states: what a node sent on of its open requests, so that the node behind it can be replaced."""

from __future__ import annotations

from collections.abc import Sequence


class _Kept:
    """States of one request at positions ``[0, n)``, row-major, all of one size."""

    def __init__(self) -> None:
        self.rows = bytearray()
        self.row_bytes = 0


class KeptStates:
    """States by request, in the host's memory; where that is used up, those of the oldest request go first.

    Args:
        limit_bytes: of all states together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._kept: dict[int, _Kept] = {}  # request -> its states, oldest first; no entry once they were dropped
        self.used_bytes = 0

    def open(self, request: int) -> None:
        """Keep what is sent on of this request from now on."""
        self._kept[request] = _Kept()

    def rename(self, request: int, new: int) -> None:
        """The states are another attempt's from now on."""
        kept = self._kept.pop(request, None)
        if kept is not None:
            self._kept[new] = kept

    def drop(self, request: int) -> None:
        """Forget the request's states."""
        kept = self._kept.pop(request, None)
        if kept is not None:
            self.used_bytes -= len(kept.rows)

    def add(self, request: int, past: int, rows: memoryview, *, num_tokens: int) -> None:
        """Keep the states at positions ``[past, past + num_tokens)``; a position that was run again is overwritten."""
        kept = self._kept.get(request)
        if kept is None:
            return
        kept.row_bytes = len(rows) // num_tokens
        begin = past * kept.row_bytes
        if begin > len(kept.rows):
            self.drop(request)  # something before it is missing
            return
        before = len(kept.rows)
        kept.rows[begin : begin + len(rows)] = rows
        self.used_bytes += len(kept.rows) - before
        while self.used_bytes > self._limit_bytes:
            self.drop(next(iter(self._kept)))

    def first(self, request: int, num_tokens: int) -> bytes | None:
        """States at positions ``[0, num_tokens)``; ``None`` where they are not all kept."""
        kept = self._kept.get(request)
        size = 0 if kept is None else num_tokens * kept.row_bytes
        if kept is None or size == 0 or len(kept.rows) < size:
            return None
        return bytes(kept.rows[:size])


def cut_rows(payload: memoryview, sizes: Sequence[int], skipped: Sequence[int]) -> memoryview:
    """The payload without the first ``skipped[i]`` rows of its part ``i``, which has ``sizes[i]``."""
    row_bytes = len(payload) // sum(sizes)
    parts, begin = [], 0
    for size, skip in zip(sizes, skipped, strict=True):
        parts.append(payload[(begin + skip) * row_bytes : (begin + size) * row_bytes])
        begin += size
    return memoryview(b"".join(parts))
