"""Batcher: what a node runs next. Pure: continuous batching at iteration level, prompts cut into chunks."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from helixbench.solver.scheduling.work import WorkItem


class Queued(msgspec.Struct):
    """A prompt that waits; ``taken`` of its tokens have run."""

    item: WorkItem
    inputs: Any
    taken: int = 0


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """Work of one iteration: an ``item`` of its own, and where in ``inputs`` (first axis: tokens) its tokens begin."""

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
        self._decodes: deque[Chunk] = deque()
        self._prefills: deque[Queued] = deque()

    @property
    def has_work(self) -> bool:
        """Whether ``next_batch`` would give anything."""
        return bool(self._decodes or self._prefills)

    def add(self, item: WorkItem, inputs: Any) -> None:
        """Queue work. ``inputs`` is the caller's, and handed back with the chunks."""
        if item.is_decode:
            self._decodes.append(Chunk(item, inputs, 0))
        else:
            self._prefills.append(Queued(item, inputs))

    def next_batch(self) -> list[Chunk]:
        """Take what runs in the next iteration: so many tokens, and of these so many decoding, at most."""
        decodes = self._decodes
        if len(decodes) <= self._max_decodes:
            batch = list(decodes)
            decodes.clear()
        else:
            batch = [decodes.popleft() for _ in range(self._max_decodes)]
        room = self._max_batch_tokens - len(batch)
        while self._prefills and room > 0:
            queued = self._prefills[0]
            whole, taken = queued.item, queued.taken
            left = whole.num_tokens - taken
            size = min(left, room)
            is_end = size == left
            item = whole
            if size < whole.num_tokens:
                item = WorkItem(
                    whole.request, whole.past + taken, size, sample=whole.sample and is_end, is_decode=False
                )
            batch.append(Chunk(item, queued.inputs, taken))
            queued.taken += size
            room -= size
            if is_end:
                self._prefills.popleft()
        return batch
