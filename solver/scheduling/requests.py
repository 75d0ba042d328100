"""Requests as the coordinator knows them, what happens to them, and what follows from it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

from helixbench.solver.problem.plan import Pipeline
from helixbench.solver.scheduling.recover import Recovery
from helixbench.solver.scheduling.work import SamplingParams, Scores, attempt_of

FinishReason = Literal["", "stop", "length", "abort", "error"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks for.

    Attributes:
        stop_token_ids: end the output, and are its last token; none of them comes before ``min_tokens`` others.
        is_prompt_scored: the first token's event brings the log probabilities of the prompt's tokens.
    """

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    is_prompt_scored: bool = False

    @property
    def kv_tokens(self) -> int:
        """KV slots that it can need: the last output token is never fed back, so it takes none."""
        return len(self.prompt) + self.max_tokens - 1


class InFlight(msgspec.Struct, eq=False):
    """An admitted request. It ends with output token number ``ends_at``; ``reason`` says why, once that is known."""

    request: Request
    pipeline: int
    ends_at: int
    num_output: int = 0
    reason: FinishReason = ""
    output: list[int] = []  # tokens so far; empty in simulations, where only their number counts
    epoch: int = 0  # rises with every pipeline that it goes on with
    without_inputs: set[str] = set()  # nodes that no longer keep all they sent on of it
    is_proven: bool = False  # this attempt gave a token: each node of its pipeline has the KV entries of all before it
    whole: set[str] = set()  # until then, nodes that have them from earlier attempts

    @property
    def attempt(self) -> int:
        """What nodes know the request by."""
        return attempt_of(self.request.number, self.epoch)

    @property
    def last_token(self) -> int:
        """The newest of its tokens."""
        return self.output[-1] if self.output else self.request.prompt[-1]

    @property
    def context_tokens(self) -> int:
        """Cached tokens that its next decode step reads, its own included."""
        return len(self.request.prompt) + self.num_output

    def end_with_next(self, reason: FinishReason) -> None:
        """End the request with its next token, whatever that is."""
        self.ends_at, self.reason = self.num_output + 1, reason


class DecodeGroup(msgspec.Struct, eq=False):
    """Sequences of one pipeline that take their next token together; ``context_tokens`` is the sum over ``members``.

    The coordinator decides about groups and the simulator moves them whole, so that an event costs about the same for
    one sequence as for a hundred. Nodes of a server run the members one by one.
    """

    pipeline: int
    members: list[InFlight]
    context_tokens: int

    @classmethod
    def of(cls, member: InFlight) -> DecodeGroup:
        """A group of one."""
        return cls(member.pipeline, [member], member.context_tokens)

    @property
    def count(self) -> int:
        """Number of sequences."""
        return len(self.members)

    def drop(self, states: Collection[InFlight]) -> None:
        """Remove those of the sequences that are among these."""
        self.members = [member for member in self.members if member not in states]
        self.context_tokens = sum(member.context_tokens for member in self.members)

    def take(self, count: int) -> DecodeGroup:
        """Remove the first ``count`` sequences and return them."""
        members, self.members = self.members[:count], self.members[count:]
        context_tokens = sum(member.context_tokens for member in members)
        self.context_tokens -= context_tokens
        return DecodeGroup(self.pipeline, members, context_tokens)


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A request got a token (``None`` when it was aborted instead); ``reason`` is set with its last one.

    ``pipeline`` is ``None`` where the request was aborted before it had one, ``scores`` where none were asked for.
    ``detail`` says what the node said of an error.
    """

    request: int
    token: int | None
    pipeline: int | None
    reason: FinishReason
    scores: Scores | None = None
    detail: str = ""


class Moved(msgspec.Struct, frozen=True):
    """A request that left a pipeline: ``recovery`` is how it goes on, ``None`` where it has to wait for room.

    ``survivors`` are the hops of the pipeline it left whose nodes work, ``attempt`` is what they know it by.
    """

    state: InFlight
    attempt: int
    survivors: Pipeline
    recovery: Recovery | None


class Actions(msgspec.Struct):
    """What follows from an event: who ended, who goes on, who was admitted, and what clients are to be told."""

    ended: list[InFlight] = []
    going: dict[int, DecodeGroup] = {}  # pipeline -> sequences that take another token
    admitted: list[InFlight] = []
    moved: list[Moved] = []
    events: list[TokenEvent] = []
