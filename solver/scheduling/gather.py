"""Gather: whether a node waits for the sequences of its last batch before it runs the next. Pure: times come in.

Where a node holds the whole model, the tokens that it has just sampled come back from the coordinator in a moment.
Started at once on whatever else waits, the next iteration would miss them, and the requests would go on as two groups
that take turns, each paying for an iteration of its own.
"""

from __future__ import annotations

WAIT_SHARE = 0.1  # of an iteration's time: what waiting may cost at most; a smaller group saves about as much
SKIPPED_AFTER_TIMEOUT = 16  # iterations run without waiting after one that waited in vain: the way back is too long


class Gather:
    """Which requests of the last batch are on their way back, and until when to wait for them."""

    def __init__(self) -> None:
        self._returning: set[int] = set()  # requests whose next token comes straight back
        self._until_s = 0.0
        self._to_skip = 0

    @property
    def is_waiting(self) -> bool:
        """Whether some request is on its way back."""
        return bool(self._returning)

    def sampled(self, requests: set[int], *, now_s: float, iteration_s: float) -> None:
        """A batch has ended: these of its requests come straight back."""
        if self._to_skip:
            self._to_skip -= 1
            self._returning = set()
            return
        self._returning = requests
        self._until_s = now_s + WAIT_SHARE * iteration_s

    def is_back(self, request: int) -> None:
        """The request has come back, or has ended."""
        self._returning.discard(request)

    def wait_s(self, now_s: float) -> float:
        """Seconds to wait before the next iteration; 0 when all are back or it has taken too long."""
        if not self._returning:
            return 0.0
        if now_s >= self._until_s:
            self._returning = set()
            self._to_skip = SKIPPED_AFTER_TIMEOUT
            return 0.0
        return self._until_s - now_s
