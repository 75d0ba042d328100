"""The stage-time model: seconds of one iteration of a layer range over a batch, linear in what the batch holds.

``t = step + L*(layer + tokens + decode + prefill) + embedding (first stage) + head (last stage)``, every coefficient
non-negative and the token term piecewise-linear, so time never falls when a batch grows.
"""

from __future__ import annotations

from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

GATHER_UP_TO_TOKENS = {"cpu": 0, "cuda": 1 << 30}
"""Device type -> longest context that is gathered; see ``attention.RaggedBatch``.

On CPU copying costs about what the calls that it saves do, and contexts of unlike length make several groups, which no
mean context tells: four of 30 to 180 tokens took 364 us a layer gathered and 263 one by one, four of 100 took 260 and
231. On a GPU every call is a launch, and hundreds of them take longer than any copy.
"""


class BatchShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one iteration holds, in the quantities that its time depends on.

    Attributes:
        prefill_tokens: prompt tokens in the batch, over all chunks.
        prefill_chunks: number of prompt chunks.
        prefill_pairs: (query, key) pairs that the chunks attend: sum of ``chunk * past + chunk * (chunk + 1) / 2``.
        decode_tokens: decoding sequences, one token each.
        decode_context_tokens: cached tokens read by them, summed over the sequences.
        sampled_tokens: sequences that leave with a new token: the decoding ones and the chunks that end a prompt.

    Means over many iterations are allowed, so the counts are floats.
    """

    prefill_tokens: float = 0.0
    prefill_chunks: float = 0.0
    prefill_pairs: float = 0.0
    decode_tokens: float = 0.0
    decode_context_tokens: float = 0.0
    sampled_tokens: float = 0.0

    @property
    def tokens(self) -> float:
        """New tokens in the batch."""
        return self.prefill_tokens + self.decode_tokens

    @property
    def items(self) -> float:
        """Sequences in the batch."""
        return self.prefill_chunks + self.decode_tokens

    def gathered_tokens(self, up_to: float) -> float:
        """Cached tokens that are copied together; see ``gathered_tokens``."""
        return gathered_tokens(self.decode_tokens, self.decode_context_tokens, up_to=up_to)


def gathered_tokens(decode_tokens: float, decode_context_tokens: float, *, up_to: float) -> float:
    """Cached tokens that are copied together, so that several sequences are attended in one call; see ``StageCost``."""
    if decode_tokens <= 1.0:
        return 0.0
    return (decode_tokens - 1.0) * min(up_to, decode_context_tokens / decode_tokens)


class StageCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Coefficients of the stage-time model of one node, all in seconds per the named unit.

    ``token_knots`` and ``layer_token_s`` have one length: tokens of the batch between knot ``k`` and knot ``k+1`` cost
    ``layer_token_s[k]`` each per layer (the last segment is open). The first knot is 1: a batch's first token is in
    ``layer_s``.

    Contexts of up to ``gather_up_to_tokens`` are copied together where several sequences decode (``attention``), which
    ``layer_gather_context_s`` is the price of, on top of reading them; a longer context is attended by itself, which
    costs about as much as copying one of that length.

    ``variation`` is the relative standard deviation of single iterations around their mean. It costs throughput where
    nodes wait for each other.

    ``max_tokens`` and ``max_context_tokens`` bound what was measured; times beyond them are extrapolated.
    """

    step_s: float
    step_item_s: float
    step_token_s: float
    layer_s: float
    token_knots: tuple[float, ...]
    layer_token_s: tuple[float, ...]
    layer_decode_item_s: float
    layer_decode_context_s: float
    layer_prefill_chunk_s: float
    layer_prefill_pair_s: float
    embed_s: float
    embed_token_s: float
    head_s: float
    head_item_s: float
    max_tokens: float
    max_context_tokens: float
    layer_gather_context_s: float = 0.0
    gather_up_to_tokens: float = 0.0
    variation: float = 0.0

    def __post_init__(self) -> None:
        if len(self.token_knots) != len(self.layer_token_s) or not self.token_knots or self.token_knots[0] != 1:
            raise ValueError("token_knots and layer_token_s: need one length, at least one entry, and first knot 1")
        if any(b <= a for a, b in pairwise(self.token_knots)):
            raise ValueError("token_knots: need ascending values")
        if not np.all(np.isfinite(self.coefficients())) or float(self.coefficients().min()) < 0:
            raise ValueError("coefficients: need finite values >= 0 seconds")

    def coefficients(self) -> FloatArray:
        """All coefficients in the order of ``feature_row``, shape [features]."""
        return np.array(
            [
                self.step_s,
                self.step_item_s,
                self.step_token_s,
                self.layer_s,
                *self.layer_token_s,
                self.layer_decode_item_s,
                self.layer_decode_context_s,
                self.layer_prefill_chunk_s,
                self.layer_prefill_pair_s,
                self.embed_s,
                self.embed_token_s,
                self.head_s,
                self.head_item_s,
                self.layer_gather_context_s,
            ]
        )

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Tokens of a batch at which the slope of ``layer_tokens_s`` may change, ascending."""
        return self.token_knots

    def time_s(self, *, num_layers: float, batch: BatchShape, first: bool, last: bool) -> float:
        """Seconds of one iteration of ``num_layers`` layers, with the embedding and the head where asked for.

        The product of ``feature_row`` and ``coefficients``, without an array for each of a few numbers.
        """
        seconds = num_layers * self.layer_time_s(batch)
        if num_layers > 0:
            seconds += self.step_s + batch.items * self.step_item_s + batch.tokens * self.step_token_s
        if first:
            seconds += self.embed_s + batch.tokens * self.embed_token_s
        if last:
            seconds += self.head_s + batch.sampled_tokens * self.head_item_s
        return seconds

    def layer_time_s(self, batch: BatchShape) -> float:
        """Seconds that one more layer adds."""
        return (
            self.layer_s
            + self.layer_tokens_s(batch.tokens)
            + batch.decode_tokens * self.layer_decode_item_s
            + batch.decode_context_tokens * self.layer_decode_context_s
            + batch.prefill_chunks * self.layer_prefill_chunk_s
            + batch.prefill_pairs * self.layer_prefill_pair_s
            + batch.gathered_tokens(self.gather_up_to_tokens) * self.layer_gather_context_s
        )

    def layer_tokens_s(self, tokens: float) -> float:
        """The part of a layer's time that depends on the batch's tokens alone: piecewise-linear, 0 at one token."""
        seconds = 0.0
        knots = self.token_knots
        for number, token_s in enumerate(self.layer_token_s):
            begin = knots[number]
            if tokens <= begin:
                break
            end = min(tokens, knots[number + 1]) if number + 1 < len(knots) else tokens
            seconds += (end - begin) * token_s
        return seconds


def feature_row(
    *,
    num_layers: float,
    batch: BatchShape,
    first: bool,
    last: bool,
    token_knots: tuple[float, ...],
    gather_up_to_tokens: float = 0.0,
) -> FloatArray:
    """The quantities that ``StageCost.coefficients`` multiply, shape [features].

    ``num_layers`` 0 stands for the embedding or the head timed alone, outside any iteration.
    """
    tokens = batch.tokens
    is_step = float(num_layers > 0)
    ends = [*token_knots[1:], float("inf")]
    segments = np.array([max(0.0, min(tokens, end) - begin) for begin, end in zip(token_knots, ends, strict=True)])
    return np.array(
        [
            is_step,
            is_step * batch.items,
            is_step * tokens,
            num_layers,
            *(num_layers * segments),
            num_layers * batch.decode_tokens,
            num_layers * batch.decode_context_tokens,
            num_layers * batch.prefill_chunks,
            num_layers * batch.prefill_pairs,
            float(first),
            tokens * first,
            float(last),
            batch.sampled_tokens * last,
            num_layers * batch.gathered_tokens(gather_up_to_tokens),
        ]
    )
