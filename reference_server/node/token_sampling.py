"""How the next token is chosen from logits: greedy, or drawn by temperature and nucleus (top-p)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import torch

MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1


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


def sample(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """The next token of one sequence.

    Args:
        logits: shape [V].
        params: how to choose.
        generator: on the CPU; draws one uniform number a token. Not used by greedy choice, which needs none.
    """
    import torch

    if params.temperature == 0:
        return int(logits.argmax())
    scaled = logits.to("cpu", torch.float64) / params.temperature
    probabilities, tokens = scaled.softmax(dim=-1).sort(descending=True, stable=True)  # [V], [V]
    cumulative = probabilities.cumsum(dim=-1)
    num_kept = int((cumulative - probabilities < params.top_p).sum())  # the token that reaches top_p is still in
    threshold = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[num_kept - 1]
    index = int(torch.searchsorted(cumulative[:num_kept], threshold, right=True))
    return int(tokens[min(index, num_kept - 1)])
