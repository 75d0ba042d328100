"""What passes between the serving rules: sampling parameters, hops of a pipeline, requests that open, tokens to run."""

from __future__ import annotations

from typing import Literal

import msgspec

from helixbench.solver.problem.plan import Hop

MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
MAX_LOGPROBS = 20

EPOCH_SHIFT = 40
"""On the wire a request is known by its attempt: its number, with the epoch in the bits above this one.

The epoch rises whenever the request is routed again. So whatever is late, from before a node was lost, belongs to an
attempt that is no longer open, and is dropped without a further rule.
"""

Routing = Literal["iwrr", "adaptive", "fixed", "random", "shortest-queue", "swarm"]


def attempt_of(number: int, epoch: int) -> int:
    """What nodes know a request by."""
    return epoch << EPOCH_SHIFT | number


def number_of(attempt: int) -> int:
    """The request that an attempt is made at."""
    return attempt & ((1 << EPOCH_SHIFT) - 1)


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How tokens are chosen, and how many log probabilities come with each.

    Attributes:
        temperature: 0 is greedy; ``top_p``, ``seed``, ``top_k`` and ``min_p`` have no effect then.
        top_p: keep the likeliest tokens that together hold this probability.
        seed: a token depends on the logits, the seed and its position alone; the request's number by default.
        top_k: keep this many of the likeliest tokens; 0 for all.
        min_p: keep tokens at least this times as likely as the likeliest.
        num_logprobs: report a token's log probability and those of this many of the likeliest; ``None`` for none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    num_logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature: need 0 to 2, got {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: need more than 0 and at most 1, got {self.top_p:g}")
        if self.seed is not None and not MIN_SEED <= self.seed <= MAX_SEED:
            raise ValueError(f"seed: need a whole number of 64 bits, got {self.seed}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k: need a number of tokens, 0 for all, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: need 0 to 1, got {self.min_p:g}")
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs: need 0 to {MAX_LOGPROBS}, got {self.num_logprobs}")


class TokenScore(msgspec.Struct, frozen=True, array_like=True):
    """A token's log probability, and the likeliest tokens in its place: (token id, log probability), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Scores(msgspec.Struct, frozen=True, array_like=True):
    """Scores of a request's new token; with its first one also those of its prompt, from the second token on."""

    request: int
    output: TokenScore
    prompt: tuple[TokenScore, ...] = ()


class OpenRequest(msgspec.Struct, frozen=True, array_like=True):
    """Reserve ``kv_tokens`` slots for a request and remember its pipeline. Always from the coordinator, so in order.

    Attributes:
        request: the attempt; see ``attempt_of``.
        stop_from: of the last node, as the next two: ``stop_token_ids`` are not sampled for positions before this.
        scored: the prompt's tokens where their log probabilities are wanted.
        adopts: an attempt at the same request that is open here, whose KV entries this one takes over instead of
            reserving slots of its own. Positions are absolute, so what runs again overwrites the same entries.
        replays: send on the outputs of this many first positions, which the node kept of the attempt it adopts.
        deliver_from: outputs of positions before this are not sent on: the nodes behind have their KV entries.
    """

    request: int
    hops: tuple[Hop, ...]
    kv_tokens: int
    sampling: SamplingParams
    stop_from: int = 0
    stop_token_ids: tuple[int, ...] = ()
    scored: tuple[int, ...] = ()
    adopts: int | None = None
    replays: int = 0
    deliver_from: int = 0


class WorkItem(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of a request: ``num_tokens`` after ``past`` cached ones; ``sample`` when the last one yields a token.

    ``is_decode`` tells the one token of a decoding sequence from the last one of a prompt cut into chunks.
    """

    request: int
    past: int
    num_tokens: int
    sample: bool
    is_decode: bool
