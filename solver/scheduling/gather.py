"""Gather rule: whether a node waits for the sequences of its last batch before it starts the next. Pure: no clock.

Where a node holds the whole model, the tokens that it has just sampled come straight back from the coordinator. If it
started at once on whatever else is queued, the next iteration would miss them, and the requests would split into two
groups that take turns, each paying the fixed cost of an iteration of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Set
from typing import Generic, TypeVar

WAIT_SHARE = 0.1
"""Longest wait, as a share of the last iteration's time: waiting longer costs about what the larger batch saves."""

SKIPPED_AFTER_TIMEOUT = 16
"""Iterations that do not wait after one that waited in vain: the way back takes too long at present."""

RequestT = TypeVar("RequestT", bound=Hashable)


class Gather(Generic[RequestT]):
    """Which requests of the last batch are expected back, and until when the node waits for them."""

    def __init__(self) -> None:
        self._returning: set[RequestT] = set()
        self._until_s = 0.0
        self._to_skip = 0

    @property
    def is_waiting(self) -> bool:
        """Whether some request is expected back."""
        return bool(self._returning)

    def sampled(self, requests: Set[RequestT], *, now_s: float, iteration_s: float) -> None:
        """An iteration has ended; these of its requests pass no other node, so they come straight back."""
        if self._to_skip:
            self._to_skip -= 1
            self._returning = set()
            return
        self._returning = set(requests)
        self._until_s = now_s + WAIT_SHARE * iteration_s

    def returned(self, requests: Iterable[RequestT]) -> None:
        """These requests have come back, or have ended."""
        self._returning.difference_update(requests)

    def wait_s(self, now_s: float) -> float:
        """Seconds to wait before the next iteration; 0 where all are back or the time is up."""
        if not self._returning:
            return 0.0
        if now_s >= self._until_s:
            self._returning = set()
            self._to_skip = SKIPPED_AFTER_TIMEOUT
            return 0.0
        return self._until_s - now_s
