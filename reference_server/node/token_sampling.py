"""How the next tokens are chosen from logits, and how likely they were.

Greedy, or drawn after temperature, top-k, nucleus (top-p) and min-p. A draw depends on the seed and the token's
position alone: neither the rest of the batch nor what was drawn before changes it, and a replay draws it again. All of
it happens on the logits' device, for many sequences at once.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from helixbench.solver.scheduling.work import SamplingParams, TokenScore

if TYPE_CHECKING:
    import torch

ROWS = 16
"""Rows of logits that are drawn from at a time: each takes some 40 bytes a token of the vocabulary meanwhile."""


class Draw(NamedTuple):
    """How the token of one sequence is chosen.

    ``position`` is the token's in the sequence, prompt included; ``barred`` are token ids that are not chosen.
    """

    params: SamplingParams
    seed: int = 0
    position: int = 0
    barred: Sequence[int] = ()


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The next token of each sequence, shape [S], on the device of the logits.

    Args:
        logits: shape [S, V].
        draws: one for each row.
    """
    import torch

    if any(draw.barred for draw in draws):
        logits = _without_barred(logits, draws)
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, draw in enumerate(draws) if draw.params.temperature > 0]
    filtered = [row for row in drawn if _is_filtered(draws[row].params, vocab=logits.shape[1])]
    plain = sorted(set(drawn) - set(filtered))
    for rows, choose in ((plain, _drawn_from_all), (filtered, _drawn_from_likeliest)):
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            index = torch.tensor(some, device=logits.device)
            tokens[index] = choose(logits[index], [draws[row] for row in some])
    return tokens


def _without_barred(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    import torch

    pairs = [(row, token) for row, draw in enumerate(draws) for token in draw.barred if token < logits.shape[1]]
    rows, tokens = torch.tensor(pairs, dtype=torch.long, device=logits.device).view(-1, 2).unbind(1)
    return logits.index_put((rows, tokens), torch.tensor(-math.inf, dtype=logits.dtype, device=logits.device))


def _is_filtered(params: SamplingParams, *, vocab: int) -> bool:
    return 0 < params.top_k < vocab or params.top_p < 1 or params.min_p > 0


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Shape [N, 1], in double precision, on the device of ``like``."""
    import torch

    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _drawn_from_all(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Tokens [N] of logits [N, V], of which all may be drawn."""
    import torch

    scaled = logits.double() / _column([draw.params.temperature for draw in draws], logits)
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    threshold = total * _column([uniform(draw.seed, draw.position) for draw in draws], logits)
    # below the total, however the product is rounded: beyond it are no tokens
    threshold = torch.minimum(threshold, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def _drawn_from_likeliest(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Tokens [N] of logits [N, V], drawn from what top-k, then top-p and min-p leave of them."""
    import torch

    vocab = logits.shape[1]
    params = [draw.params for draw in draws]
    scaled = logits.double() / _column([each.temperature for each in params], logits)
    scaled, tokens = scaled.sort(dim=-1, descending=True, stable=True)  # of equal ones the first stays the first
    place = torch.arange(vocab, device=logits.device)[None]
    is_kept = place < _column([each.top_k or vocab for each in params], logits)
    probabilities = scaled.where(is_kept, -math.inf).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # the token that reaches top_p is still in
    is_kept &= cumulative - probabilities < _column([each.top_p for each in params], logits)
    is_kept &= probabilities >= _column([each.min_p for each in params], logits) * probabilities[:, :1]
    last = is_kept.sum(dim=-1, keepdim=True).clamp(min=1) - 1
    threshold = cumulative.gather(1, last) * _column([uniform(draw.seed, draw.position) for draw in draws], logits)
    index = torch.searchsorted(cumulative, threshold, right=True).minimum(last)
    return tokens.gather(1, index)[:, 0]


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
