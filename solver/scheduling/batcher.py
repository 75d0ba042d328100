"""Batcher: what a node runs in its next iteration. Continuous batching with chunked prefill; pure.

Sources: Orca (Yu et al., OSDI 2022) for batching at iteration level, Sarathi-Serve (Agrawal et al., OSDI 2024) for
decodes first and prompts cut into chunks that fill the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, Self, TypeVar

import msgspec

from helixbench.solver.scheduling.work import WorkItem


class Decodes(Protocol):
    """Decoding sequences that are queued together, one token each."""

    @property
    def count(self) -> int:
        """Number of sequences."""
        ...

    def take(self, count: int) -> Self:
        """Remove the first ``count`` sequences, which are not all of them, and return them."""
        ...


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """Work of one request in one iteration. Its tokens begin at row ``offset`` of ``inputs``, whose rows are tokens."""

    item: WorkItem
    inputs: Any
    offset: int

    @property
    def count(self) -> int:
        """Number of sequences."""
        return 1

    def take(self, count: int) -> Self:
        """A single sequence cannot be divided."""
        raise AssertionError(f"{count} sequences were asked of the one of request {self.item.request}")


DecodesT = TypeVar("DecodesT", bound=Decodes)


class _Prompt(msgspec.Struct):
    """A queued prompt, of which ``taken`` tokens have run."""

    item: WorkItem
    inputs: Any
    taken: int = 0


class Batcher(Generic[DecodesT]):
    """Decoding sequences first, then prompts in order of arrival; the last prompt is cut where the batch is full.

    A server queues each decoding sequence as a ``Chunk``; the simulator queues groups of them. Only the first of the
    queued prompts is ever cut, so the chunks of a request keep their order.

    Args:
        max_batch_tokens: tokens in an iteration at most.
        max_decode_batch: decoding sequences among them at most; ``None`` for no limit of their own.
    """

    def __init__(self, *, max_batch_tokens: int, max_decode_batch: int | None = None) -> None:
        if max_batch_tokens < 1 or (max_decode_batch is not None and max_decode_batch < 1):
            raise ValueError(
                f"max_batch_tokens, max_decode_batch: need >= 1, got {max_batch_tokens}, {max_decode_batch}"
            )
        self._max_batch_tokens = max_batch_tokens
        self._max_decodes = min(max_batch_tokens, max_decode_batch or max_batch_tokens)
        self._decodes: deque[DecodesT] = deque()
        self._prompts: deque[_Prompt] = deque()

    @property
    def has_work(self) -> bool:
        """Whether ``next_batch`` would return anything."""
        return bool(self._decodes or self._prompts)

    def add_decodes(self, decodes: DecodesT) -> None:
        """Queue decoding sequences."""
        self._decodes.append(decodes)

    def add_prompt(self, item: WorkItem, inputs: Any) -> None:
        """Queue a prompt, or a chunk of one; ``inputs`` comes back with each of the chunks that it is cut into."""
        self._prompts.append(_Prompt(item, inputs))

    def retain(
        self, is_kept_decode: Callable[[DecodesT], bool], is_kept_prompt: Callable[[WorkItem, Any], bool]
    ) -> None:
        """Drop what is queued of requests that are over; prompts are asked for with their item and their inputs."""
        self._decodes = deque(decodes for decodes in self._decodes if is_kept_decode(decodes))
        self._prompts = deque(prompt for prompt in self._prompts if is_kept_prompt(prompt.item, prompt.inputs))

    def next_batch(self) -> tuple[list[DecodesT], list[Chunk]]:
        """Remove what runs in the next iteration: decoding sequences, and chunks of prompts."""
        decodes: list[DecodesT] = []
        room = self._max_decodes
        while self._decodes and room > 0:
            first = self._decodes[0]
            count = first.count
            if count > room:
                first, count = first.take(room), room
            else:
                self._decodes.popleft()
            decodes.append(first)
            room -= count
        chunks: list[Chunk] = []
        room += self._max_batch_tokens - self._max_decodes
        while self._prompts and room > 0:
            prompt = self._prompts[0]
            whole, taken = prompt.item, prompt.taken
            size = min(whole.num_tokens - taken, room)
            is_end = taken + size == whole.num_tokens
            item = whole
            if size < whole.num_tokens:
                item = WorkItem(
                    whole.request, whole.past + taken, size, sample=whole.sample and is_end, is_decode=False
                )
            chunks.append(Chunk(item, prompt.inputs, taken))
            prompt.taken += size
            room -= size
            if is_end:
                self._prompts.popleft()
        return decodes, chunks
