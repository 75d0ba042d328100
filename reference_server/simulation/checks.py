"""Conservation: what must hold in every run, checked as it goes. A breach is a bug of ours, never a user's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helixbench.reference_server.simulation.node import SimulatedNode
    from helixbench.solver.scheduling.coordinator import Coordinator, Request, TokenEvent


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
        """At any moment: no request is lost, and no node holds more than it has."""
        known = num_waiting + num_in_flight
        if len(self._left) != known:
            raise ConservationError(f"{len(self._left)} requests have not ended, but {known} wait or are in flight")
        for node in nodes:
            if not 0 <= node.kv_used_tokens <= node.kv_capacity_tokens:
                raise ConservationError(f"{node.name}: {node.kv_used_tokens} KV slots of {node.kv_capacity_tokens}")


def require_nothing_left(nodes: Iterable[SimulatedNode], coordinator: Coordinator) -> None:
    """Where all requests have ended and nothing is on its way: KV slots freed are KV slots taken, and no work is left.

    Raises:
        ConservationError: naming who holds what.
    """
    for name, held in coordinator.kv_held_tokens.items():
        if held:
            raise ConservationError(f"the coordinator holds {held} KV slots of {name} for requests that have ended")
    for node in nodes:
        if node.kv_used_tokens or node.open_requests:
            raise ConservationError(
                f"{node.name}: {node.open_requests} requests that have ended hold {node.kv_used_tokens} KV slots"
            )
        if node.num_early or not node.is_idle:
            raise ConservationError(f"{node.name}: work is left that no request waits for")
