"""Messages that have arrived and are not due yet: latency that a link is to have beyond its own.

The sender says when a message is due, by ``time.monotonic``, which all processes of a machine share.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable
from typing import Generic, TypeVar

MessageT = TypeVar("MessageT")


def due_s(latency_s: float) -> float:
    """When a message that is sent now over a link of that latency is due; 0, which is always past, without one."""
    return time.monotonic() + latency_s if latency_s else 0.0


class HeldMessages(Generic[MessageT]):
    """Messages in the order in which they are due; of those due at once, in the order in which they came."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: list[tuple[float, int, MessageT]] = []  # heap of (due, number, message)
        self._numbers = itertools.count()

    def add(self, message: MessageT, *, due_s: float) -> None:
        """Keep a message until it is due."""
        heapq.heappush(self._held, (due_s, next(self._numbers), message))

    def take(self) -> list[MessageT]:
        """Remove and return what is due."""
        now_s = self._clock() if self._held else 0.0
        taken = []
        while self._held and self._held[0][0] <= now_s:
            taken.append(heapq.heappop(self._held)[2])
        return taken

    def poll_ms(self, timeout_ms: int) -> int:
        """How long to wait for other messages: until the next one here is due, and no longer than that."""
        if not self._held:
            return timeout_ms
        return max(0, min(timeout_ms, math.ceil(1e3 * (self._held[0][0] - self._clock()))))
