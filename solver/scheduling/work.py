"""What passes between the serving rules: sampling parameters, hops of a pipeline, requests that open, tokens to run."""

from __future__ import annotations

from typing import Literal

import msgspec

from helixbench.solver.problem.plan import Hop

MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1

Routing = Literal["iwrr", "fixed", "random", "shortest-queue", "swarm"]


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """``temperature`` 0 is greedy: the rest has no effect then. ``top_p`` keeps the likeliest tokens that hold it."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature: need 0 to 2, got {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: need more than 0 and at most 1, got {self.top_p:g}")
        if self.seed is not None and not MIN_SEED <= self.seed <= MAX_SEED:
            raise ValueError(f"seed: need a whole number of 64 bits, got {self.seed}")


class OpenRequest(msgspec.Struct, frozen=True, array_like=True):
    """Reserve ``kv_tokens`` slots for a request and remember its pipeline. Always from the coordinator, so in order."""

    request: int
    hops: tuple[Hop, ...]
    kv_tokens: int
    sampling: SamplingParams


class WorkItem(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of a request: ``num_tokens`` after ``past`` cached ones; ``sample`` when the last one yields a token.

    ``is_decode`` tells the one token of a decoding sequence from the last one of a prompt cut into chunks.
    """

    request: int
    past: int
    num_tokens: int
    sample: bool
    is_decode: bool
