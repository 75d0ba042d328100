"""History: a node's iterations summed over equal intervals, in constant memory however long it serves."""

from __future__ import annotations

import msgspec

MAX_INTERVALS = 128
FIRST_WIDTH_S = 0.25


class Interval(msgspec.Struct, frozen=True, array_like=True):
    """One interval: iterations that ended in it, their decode tokens, time spent in iterations, and KV use.

    ``kv_tokens`` are the slots that requests own after the last iteration.
    """

    iterations: int
    decode_tokens: int
    busy_s: float
    kv_tokens: int


class History(msgspec.Struct, frozen=True):
    """What a node did, in intervals of ``width_s``; the first began ``age_s`` before the history was read."""

    width_s: float
    age_s: float
    intervals: tuple[Interval, ...]


class HistoryKeeper:
    """Adds iterations to intervals; when there are too many, pairs are merged and intervals last twice as long.

    Time begins with the first iteration. Any monotonic clock will do.
    """

    def __init__(self) -> None:
        self._start_s: float | None = None
        self._width_s = FIRST_WIDTH_S
        self._iterations: list[int] = []
        self._decode_tokens: list[int] = []
        self._busy_s: list[float] = []
        self._kv_tokens: list[int] = []

    def add(self, begin_s: float, end_s: float, *, decode_tokens: int, kv_tokens: int) -> None:
        """Add an iteration: it counts where it ends, its time where it was spent. ``kv_tokens`` are in use after it."""
        if self._start_s is None:
            self._start_s = begin_s
        self._reach(end_s)
        last = len(self._iterations) - 1
        self._iterations[last] += 1
        self._decode_tokens[last] += decode_tokens
        self._kv_tokens[last] = kv_tokens
        at = max(begin_s - self._start_s, 0.0)
        until = end_s - self._start_s
        for index in range(min(int(at / self._width_s), last), last):
            edge = (index + 1) * self._width_s
            self._busy_s[index] += edge - at
            at = edge
        self._busy_s[last] += until - at

    def read(self, now_s: float) -> History:
        """Everything up to now."""
        if self._start_s is None:
            return History(width_s=self._width_s, age_s=0.0, intervals=())
        self._reach(now_s)
        columns = zip(self._iterations, self._decode_tokens, self._busy_s, self._kv_tokens, strict=True)
        return History(
            width_s=self._width_s, age_s=now_s - self._start_s, intervals=tuple(Interval(*row) for row in columns)
        )

    def _reach(self, at_s: float) -> None:
        """Append intervals until the last one contains this time."""
        assert self._start_s is not None
        after_s = at_s - self._start_s
        while after_s >= MAX_INTERVALS * self._width_s:
            self._halve()
        missing = int(after_s / self._width_s) + 1 - len(self._iterations)
        if missing > 0:
            self._kv_tokens += [self._kv_tokens[-1] if self._kv_tokens else 0] * missing
            for counts in (self._iterations, self._decode_tokens):
                counts += [0] * missing
            self._busy_s += [0.0] * missing

    def _halve(self) -> None:
        self._width_s *= 2
        self._iterations = [sum(self._iterations[i : i + 2]) for i in range(0, len(self._iterations), 2)]
        self._decode_tokens = [sum(self._decode_tokens[i : i + 2]) for i in range(0, len(self._decode_tokens), 2)]
        self._busy_s = [sum(self._busy_s[i : i + 2]) for i in range(0, len(self._busy_s), 2)]
        self._kv_tokens = [self._kv_tokens[i : i + 2][-1] for i in range(0, len(self._kv_tokens), 2)]
