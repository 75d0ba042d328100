"""How the next token is chosen from logits: greedy, or drawn by temperature and nucleus (top-p)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helixbench.solver.scheduling.work import SamplingParams

if TYPE_CHECKING:
    import torch


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
