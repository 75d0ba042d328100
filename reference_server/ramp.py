"""How a closed loop begins: one request, then another and another until all are in flight.

Requests that all begin at once stay in step for many rounds: prompts come together, requests end in waves, and a run of
a few rounds shows that start and not what a cluster does in the long run. So they begin evenly spread over one request's
time. That time is not known before a run, and passes faster while few are in flight, so it is counted in output tokens:
with ``k`` requests in flight a round gives ``k`` tokens, and a request of ``o`` tokens lasts ``o`` rounds, hence the
``k``-th further request of ``n`` is due once ``o k (k + 1) / (2 n)`` tokens have come out.
"""

from __future__ import annotations

import math


class Ramp:
    """How many of the first requests are due.

    Args:
        concurrency: requests that are to be in flight in the end, at least one.
        output_tokens: mean of a request.
    """

    def __init__(self, concurrency: int, output_tokens: float) -> None:
        self._concurrency, self._output_tokens = concurrency, output_tokens
        self._begun = 0

    def due(self, output_tokens: int) -> int:
        """How many more requests are to begin now that so many tokens have come out, of all requests together."""
        further = (math.sqrt(1 + 8 * self._concurrency * output_tokens / self._output_tokens) - 1) / 2
        begun = min(self._concurrency, 1 + int(further + 1e-9))
        more, self._begun = max(0, begun - self._begun), max(begun, self._begun)
        return more
