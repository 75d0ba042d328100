"""Conservation: what must hold in every run, checked as it goes. A breach is a bug of ours, never a user's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..coordinator import Request, TokenEvent
    from .node import SimulatedNode


class ConservationError(AssertionError):
    """Tokens, KV slots or requests were lost or made up."""


class Ledger:
    """Every request once, every token once: from submission to the last output token."""

    def __init__(self) -> None:
        self._left: dict[int, int] = {}  # submitted and not yet ended -> output tokens still to come
        self.num_submitted = 0
        self.num_ended = 0

    def submitted(self, request: Request) -> None:
        """A request came in."""
        if request.number in self._left:
            raise ConservationError(f"request {request.number} was submitted twice")
        self._left[request.number] = request.max_tokens
        self.num_submitted += 1

    def told(self, event: TokenEvent) -> None:
        """The coordinator told its client of a token."""
        left = self._left.get(event.request)
        if not left:
            raise ConservationError(f"request {event.request} got a token that it did not ask for")
        if (left == 1) != bool(event.reason):
            raise ConservationError(f"request {event.request} ended ({event.reason!r}) with {left - 1} tokens to come")
        if left == 1:
            del self._left[event.request]
            self.num_ended += 1
        else:
            self._left[event.request] = left - 1

    def close(self, nodes: Iterable[SimulatedNode], *, num_waiting: int, num_in_flight: int) -> None:
        """At any moment: nothing is lost. Where nothing is in flight and on the way, nodes hold nothing either."""
        known = num_waiting + num_in_flight
        if len(self._left) != known:
            raise ConservationError(f"{len(self._left)} requests have not ended, but {known} wait or are in flight")
        for node in nodes:
            if not 0 <= node.kv_used_tokens <= node.kv_capacity_tokens:
                raise ConservationError(f"{node.name}: {node.kv_used_tokens} KV slots of {node.kv_capacity_tokens}")
