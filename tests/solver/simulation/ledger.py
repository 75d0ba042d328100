"""Conservation: what holds in every simulation, checked as it goes by stand-ins for the batcher and the coordinator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from helixbench.solver.scheduling.batcher import Batcher, Chunk
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.requests import Actions, DecodeGroup, InFlight


class ConservationError(AssertionError):
    """Tokens, KV slots or requests were lost or made up."""


class CheckedBatcher(Batcher[DecodeGroup]):
    """Every token of every request runs once on each node, in order."""

    def __init__(self, **limits: Any) -> None:
        super().__init__(**limits)
        self._filled: dict[InFlight, int] = {}  # request -> KV slots of it that are filled here

    def next_batch(self) -> tuple[list[DecodeGroup], list[Chunk]]:
        decodes, chunks = super().next_batch()
        for group in decodes:
            if group.context_tokens != sum(member.context_tokens for member in group.members):
                raise ConservationError("a group's context is not that of its members")
            for member in group.members:
                self._fill(member, member.context_tokens - 1, 1)
        for chunk in chunks:
            self._fill(chunk.inputs, chunk.item.past, chunk.item.num_tokens)
        return decodes, chunks

    def _fill(self, request: InFlight, past: int, num_tokens: int) -> None:
        if self._filled.get(request, 0) != past:
            raise ConservationError(f"request {request.request.number} runs a token twice, or skips one")
        self._filled[request] = past + num_tokens


class CheckedCoordinator(Coordinator):
    """No KV cache is over-committed, no request gets a token too many, and none keeps a slot when it has ended."""

    def advance(self, groups: Iterable[DecodeGroup]) -> Actions:
        groups = list(groups)
        for group in groups:
            for member in group.members:
                if self._in_flight.get(member.request.number) is not member:
                    raise ConservationError(f"request {member.request.number} got a token that it did not ask for")
        actions = super().advance(groups)
        for state in actions.ended:
            if state.num_output != state.request.max_tokens:
                raise ConservationError(f"request {state.request.number} ended after {state.num_output} tokens")
        self._check()
        return actions

    def admit(self, *, onto: Actions | None = None) -> Actions:
        actions = super().admit(onto=onto)
        self._check()
        return actions

    def _check(self) -> None:
        held = dict.fromkeys(self._capacity, 0)
        for state in self._in_flight.values():
            for hop in self._router.pipelines[state.pipeline]:
                held[hop.node] += state.request.kv_tokens
        if held != self.kv_held_tokens:
            raise ConservationError(
                f"requests in flight hold {held} KV slots; the coordinator has {self.kv_held_tokens}"
            )
        for node, slots in held.items():
            if slots > self._capacity[node]:
                raise ConservationError(f"{node}: {slots} KV slots of {self._capacity[node]}")
