"""Batcher: what a node runs next. Pure: continuous batching at iteration level, prompts cut into chunks."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from .messages import WorkItem


class Queued(msgspec.Struct):
    """Work that waits. ``inputs`` is what the caller runs (its first axis is tokens); ``taken`` of them have run."""

    item: WorkItem
    inputs: Any
    taken: int = 0


class Chunk(msgspec.Struct, frozen=True):
    """A part of queued work that runs now: an ``item`` of its own, and where in ``inputs`` its tokens begin."""

    item: WorkItem
    inputs: Any
    offset: int


class Batcher:
    """Decoding sequences first, then prompts in the order of arrival, cut where the batch is full.

    A request's chunks keep their order: only the first of the waiting prompts is ever cut.
    """

    def __init__(self, *, max_batch_tokens: int, max_decode_batch: int | None = None) -> None:
        if max_batch_tokens < 1 or (max_decode_batch is not None and max_decode_batch < 1):
            raise ValueError(
                f"max_batch_tokens, max_decode_batch: need >= 1, got {max_batch_tokens}, {max_decode_batch}"
            )
        self._max_batch_tokens = max_batch_tokens
        self._max_decodes = min(max_batch_tokens, max_decode_batch or max_batch_tokens)
        self._decodes: deque[Queued] = deque()
        self._prefills: deque[Queued] = deque()

    @property
    def has_work(self) -> bool:
        """Whether ``next_batch`` would give anything."""
        return bool(self._decodes or self._prefills)

    def add(self, item: WorkItem, inputs: Any) -> None:
        """Queue work."""
        (self._decodes if item.is_decode else self._prefills).append(Queued(item, inputs))

    def next_batch(self) -> list[Chunk]:
        """Take what runs in the next iteration: so many tokens, and of these so many decoding, at most."""
        batch: list[Chunk] = []
        while self._decodes and len(batch) < self._max_decodes:
            queued = self._decodes.popleft()
            batch.append(Chunk(queued.item, queued.inputs, 0))
        room = self._max_batch_tokens - len(batch)
        while self._prefills and room > 0:
            queued = self._prefills[0]
            left = queued.item.num_tokens - queued.taken
            size = min(left, room)
            item = WorkItem(
                queued.item.request,
                queued.item.past + queued.taken,
                size,
                sample=queued.item.sample and size == left,
                is_decode=False,
            )
            batch.append(Chunk(item, queued.inputs, queued.taken))
            queued.taken += size
            room -= size
            if size == left:
                self._prefills.popleft()
        return batch
