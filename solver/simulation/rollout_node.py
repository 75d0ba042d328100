"""A node in a rollout: the server's batching and gathering, with sequences of one pipeline taken together.

Between nodes move bunches: the decoding sequences of one pipeline that were in one iteration. All that an iteration
depends on is a sum over its sequences, so a hop costs as much for a bunch of a hundred as for one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import TypeAlias

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.problem.plan import Pipeline
from helixbench.solver.simulation.event_loop import ITERATION_BEGIN, ITERATION_END, Kernel
from helixbench.solver.simulation.stage_time import Counts, StageTimer

WAIT_SHARE = 0.1
"""Of an iteration: how long a node that holds the whole model waits for its last batch to come back."""

SKIPPED_AFTER_TIMEOUT = 16
"""Iterations run without waiting after one that waited in vain."""

POLL_S = 1e-3
"""A node waits in whole multiples of this."""


class Request:
    """A request: which pipeline it takes, and how many output tokens are still to come."""

    __slots__ = ("arrival_s", "first_token_s", "left", "output_tokens", "pipeline", "prompt_tokens")

    def __init__(self, prompt_tokens: int, output_tokens: int, pipeline: int, arrival_s: float) -> None:
        self.prompt_tokens, self.output_tokens, self.left = prompt_tokens, output_tokens, output_tokens
        self.pipeline, self.arrival_s, self.first_token_s = pipeline, arrival_s, arrival_s

    @property
    def kv_tokens(self) -> int:
        """KV slots that it reserves; the last output token is never fed back."""
        return self.prompt_tokens + self.output_tokens - 1

    @property
    def context(self) -> int:
        """Cached tokens that its next decode step reads, its own included."""
        return self.prompt_tokens + self.output_tokens - self.left


class Bunch:
    """Decoding sequences of one pipeline, one token each; ``context`` is the sum over ``requests``."""

    __slots__ = ("context", "pipeline", "requests")

    def __init__(self, pipeline: int, requests: list[Request], context: int) -> None:
        self.pipeline, self.requests, self.context = pipeline, requests, context


class Prompt:
    """``num_tokens`` of a prompt after ``past``; ``taken`` of them have run here, ``is_end`` when the last is in it."""

    __slots__ = ("is_end", "num_tokens", "past", "request", "taken")

    def __init__(self, request: Request, past: int, num_tokens: int, *, is_end: bool) -> None:
        self.request, self.past, self.num_tokens, self.is_end = request, past, num_tokens, is_end
        self.taken = 0


class Parcel:
    """What one message carries, or one iteration runs; ``closed`` are over, and were at no other node."""

    __slots__ = ("bunches", "closed", "prompts")

    def __init__(self) -> None:
        self.bunches: list[Bunch] = []
        self.prompts: list[Prompt] = []
        self.closed: list[Request] = []

    @property
    def num_tokens(self) -> int:
        """New tokens in it."""
        return sum(len(b.requests) for b in self.bunches) + sum(prompt.num_tokens for prompt in self.prompts)

    @property
    def num_requests(self) -> int:
        """Requests in it."""
        return sum(len(b.requests) for b in self.bunches) + len(self.prompts)


Send: TypeAlias = Callable[[str, str, int, Parcel], None]
"""``(from, to, tokens, parcel)``."""


class RolloutNode:
    """One node.

    Args:
        name: its name.
        pipelines: all of them, by index.
        is_last: whether tokens are sampled here.
        kernel: clock and queue.
        timer: seconds of an iteration.
        max_tokens: in an iteration.
        max_decodes: decoding sequences in an iteration.
        send: puts a parcel on the wires.
    """

    def __init__(
        self,
        name: str,
        pipelines: Mapping[int, Pipeline],
        kernel: Kernel,
        *,
        is_last: bool,
        timer: StageTimer,
        max_tokens: int,
        max_decodes: int,
        send: Send,
    ) -> None:
        self.busy_s = 0.0
        self.iterations = self.decoded = 0
        self._name, self._kernel, self._timer, self._send = name, kernel, timer, send
        self._max_tokens, self._max_decodes, self._is_last = max_tokens, min(max_tokens, max_decodes), is_last
        self._way: dict[int, tuple[int, str, bool]] = {}  # pipeline -> (entry layer, next node, whether alone in it)
        for index, hops in pipelines.items():
            places = [place for place, hop in enumerate(hops) if hop.node == name]
            if places:
                onward = hops[places[0] + 1].node if places[0] + 1 < len(hops) else COORDINATOR
                self._way[index] = (hops[places[0]].start, onward, len(hops) == 1)
        self._waits_for_its_own = is_last and any(alone for _, _, alone in self._way.values())
        self._bunches: deque[Bunch] = deque()
        self._prompts: deque[Prompt] = deque()
        self._is_running = self._is_woken = False
        self._returning: set[Request] = set()  # requests whose next token comes straight back
        self._until_s = 0.0  # and until when they are waited for
        self._to_skip = 0  # iterations that end without waiting

    def receive(self, parcel: Parcel) -> None:
        """Queue what has come."""
        self._bunches.extend(parcel.bunches)
        self._prompts.extend(parcel.prompts)
        if self._returning:
            self._returning.difference_update(parcel.closed)
            for bunch in parcel.bunches:
                self._returning.difference_update(bunch.requests)
        self._wake()

    def _wake(self) -> None:
        """Look at the end of this moment whether an iteration begins."""
        if not self._is_running and not self._is_woken and (self._bunches or self._prompts):
            self._is_woken = True
            self._kernel.at(self._kernel.now_s, ITERATION_BEGIN, self._begin)

    def _begin(self, _: None) -> None:
        self._is_woken = False
        if self._is_running or not (self._bunches or self._prompts):
            return
        now_s = self._kernel.now_s
        if self._returning:
            if now_s < self._until_s:
                polls = math.ceil((self._until_s - now_s) / POLL_S)
                self._kernel.at(now_s + polls * POLL_S, ITERATION_BEGIN, self._begin)
                return
            self._returning = set()
            self._to_skip = SKIPPED_AFTER_TIMEOUT
        batch = self._next_batch()
        seconds = self._timer.seconds(self._counts(batch))
        self._is_running = True
        self.busy_s += seconds
        self.iterations += 1
        self._kernel.at(now_s + seconds, ITERATION_END, self._end, (batch, seconds))

    def _next_batch(self) -> Parcel:
        """The server's rule: decoding sequences first, then prompts as they came, the last cut where it is full."""
        batch = Parcel()
        merged: dict[int, Bunch] = {}  # pipeline -> its sequences
        room = self._max_decodes
        while self._bunches and room > 0:
            bunch = self._bunches[0]
            if len(bunch.requests) > room:
                bunch = _split(bunch, room)
            else:
                self._bunches.popleft()
            room -= len(bunch.requests)
            there = merged.get(bunch.pipeline)
            if there is None:
                merged[bunch.pipeline] = bunch
            else:
                there.requests += bunch.requests
                there.context += bunch.context
        batch.bunches = list(merged.values())
        room = self._max_tokens - (self._max_decodes - room)
        while self._prompts and room > 0:
            prompt = self._prompts[0]
            left = prompt.num_tokens - prompt.taken
            size = min(left, room)
            is_end = size == left
            past = prompt.past + prompt.taken
            batch.prompts.append(Prompt(prompt.request, past, size, is_end=prompt.is_end and is_end))
            prompt.taken += size
            room -= size
            if is_end:
                self._prompts.popleft()
        return batch

    def _counts(self, batch: Parcel) -> list[tuple[int, Counts]]:
        """What the timer has to know, by the layer at which it enters."""
        found: dict[int, list[float]] = {}
        for bunch in batch.bunches:
            counts = found.setdefault(self._way[bunch.pipeline][0], [0.0] * 6)
            counts[3] += len(bunch.requests)
            counts[4] += bunch.context
            counts[5] += len(bunch.requests)
            self.decoded += len(bunch.requests)
        for prompt in batch.prompts:
            counts = found.setdefault(self._way[prompt.request.pipeline][0], [0.0] * 6)
            size = prompt.num_tokens
            counts[0] += size
            counts[1] += 1
            counts[2] += size * (prompt.past + (size + 1) / 2)
            counts[5] += prompt.is_end
        return [(entry, (c[0], c[1], c[2], c[3], c[4], c[5])) for entry, c in sorted(found.items())]

    def _end(self, ran: tuple[Parcel, float]) -> None:
        batch, seconds = ran
        now_s = self._kernel.now_s
        self._is_running = False
        going: dict[str, Parcel] = {}  # next node -> what goes there
        for bunch in batch.bunches:
            going.setdefault(self._way[bunch.pipeline][1], Parcel()).bunches.append(bunch)
        for prompt in batch.prompts:
            onward = self._way[prompt.request.pipeline][1]
            if onward != COORDINATOR or prompt.is_end:
                going.setdefault(onward, Parcel()).prompts.append(prompt)
        if self._waits_for_its_own:
            self._gather(batch, now_s + WAIT_SHARE * seconds)
        for onward, parcel in going.items():
            tokens = parcel.num_requests if onward == COORDINATOR else parcel.num_tokens
            self._send(self._name, onward, tokens, parcel)
        self._wake()

    def _gather(self, batch: Parcel, until_s: float) -> None:
        """Requests that are at no other node come straight back: they are waited for."""
        self._returning = set()
        if self._to_skip:
            self._to_skip -= 1
            return
        for bunch in batch.bunches:
            if self._way[bunch.pipeline][2]:
                self._returning.update(bunch.requests)
        self._returning.update(p.request for p in batch.prompts if p.is_end and self._way[p.request.pipeline][2])
        self._until_s = until_s


def _split(bunch: Bunch, size: int) -> Bunch:
    """Take the first ``size`` sequences out of a bunch."""
    requests, bunch.requests = bunch.requests[:size], bunch.requests[size:]
    context = sum(request.context for request in requests)
    bunch.context -= context
    return Bunch(bunch.pipeline, requests, context)
