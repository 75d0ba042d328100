"""How the next token is chosen from logits, and how likely it was.

Greedy, or drawn after temperature, top-k, nucleus (top-p) and min-p. The draw depends on the seed and the token's
position alone: neither the rest of the batch nor what was drawn before changes it, and a replay draws it again.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from helixbench.solver.scheduling.work import SamplingParams, TokenScore

if TYPE_CHECKING:
    import torch


def sample(
    logits: torch.Tensor, params: SamplingParams, *, seed: int, position: int, barred: Sequence[int] = ()
) -> int:
    """The next token of one sequence.

    Args:
        logits: shape [V].
        params: how to choose.
        seed: of the sequence.
        position: of the token in the sequence, prompt included.
        barred: token ids that are not chosen.
    """
    import torch

    if barred:
        known = [token for token in barred if token < logits.shape[0]]
        logits = logits.index_fill(0, torch.tensor(known, device=logits.device), -math.inf)
    if params.temperature == 0:
        return int(logits.argmax())
    scaled = logits.to("cpu", torch.float64) / params.temperature
    if 0 < params.top_k < scaled.shape[0]:
        scaled, tokens = scaled.topk(params.top_k)  # [K], [K]
    else:
        scaled, tokens = scaled.sort(descending=True, stable=True)  # [V], [V]
    probabilities = scaled.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    is_kept = cumulative - probabilities < params.top_p  # the token that reaches top_p is still in
    is_kept &= probabilities >= params.min_p * probabilities[0]
    num_kept = int(is_kept.sum())
    threshold = uniform(seed, position) * cumulative[num_kept - 1]
    index = int(torch.searchsorted(cumulative[:num_kept], threshold, right=True))
    return int(tokens[min(index, num_kept - 1)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), the same on every machine."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, position), digest_size=8).digest()
    return float((int.from_bytes(digest, "little") >> 11) / 2**53)


def score(logits: torch.Tensor, tokens: Sequence[int], num_top: int) -> list[TokenScore]:
    """Scores of one token per row of logits [N, V], before temperature and filters, with the ``num_top`` likeliest."""
    import torch

    logprobs = logits.float().log_softmax(dim=-1)  # [N, V]
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(num_top, logprobs.shape[1]), dim=-1)
    rows = zip(chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    return [TokenScore(logprob, tuple(zip(ids, values, strict=True))) for logprob, ids, values in rows]
