"""Attention over a ragged batch: sequences of any length side by side, none padded to the longest.

The tokens of all sequences lie in one row of the model's batch axis; this function, registered with transformers under
``ATTENTION``, writes their keys and values into the KV cache and lets each sequence attend to its own slots.
Axes: B = 1 batch row, H query heads, K KV heads, G = H / K, T tokens of the batch, N tokens of one sequence, C its
context, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch.nn.functional import scaled_dot_product_attention

ATTENTION = "helixbench_ragged"
# A group of decoding sequences is gathered into one padded call while padding wastes no more than this share of it.
MAX_PADDING = 0.25
MAX_GATHERED_SLOTS = 1 << 15
"""Most slots, padding included, that one call copies, so that memory is bounded however many and long the contexts are.

With 8 KV heads of 128 in two bytes they are 134 MB.
"""


MAX_CAPPED_SCORES = 1 << 22
"""Most scores that are held at once where they are capped; 16 MiB in four bytes."""


class Span(msgspec.Struct, frozen=True):
    """One sequence's part of the batch: ``num_tokens`` new tokens after ``past`` cached ones, slots from ``offset``."""

    offset: int
    past: int
    num_tokens: int


class RaggedBatch:
    """Where every token of a batch is written and what it reads, worked out once and used by every layer.

    Args:
        spans: the sequences in the order of their tokens.
        arena: the stage's KV cache. # [L, 2, K, C, D]
        first_layer: model layer that ``arena[0]`` belongs to.
        windows: model layer -> tokens that one sees back, itself included; ``None`` for all.
        gather_up_to: decoding sequences with contexts up to this many tokens are gathered, similar lengths together,
            into padded calls: few calls, but their keys and values are copied. Longer ones are called each on a view of
            its own slots.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        *,
        arena: torch.Tensor,
        first_layer: int,
        windows: Mapping[int, int | None],
        gather_up_to: int,
    ) -> None:
        self._arena = arena
        self._first_layer = first_layer
        self._windows = windows
        device = arena.device
        slots: list[int] = []
        self._prefills: list[tuple[int, Span]] = []  # (index of its first token, span)
        decodes: list[tuple[int, Span]] = []
        for span in spans:
            where = (len(slots), span)
            (decodes if span.num_tokens == 1 else self._prefills).append(where)
            slots.extend(range(span.offset + span.past, span.offset + span.past + span.num_tokens))
        self._slots = torch.tensor(slots, device=device)  # [T]
        self.positions = torch.tensor(
            [position for span in spans for position in range(span.past, span.past + span.num_tokens)], device=device
        )  # [T]
        groups = _groups([where for where in decodes if where[1].past < gather_up_to])
        self._groups = [group for group in groups if len(group) > 1]
        self._decodes = [where for where in decodes if where[1].past >= gather_up_to]
        self._decodes += [where for group in groups if len(group) == 1 for where in group]
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}  # (first token, window) -> mask
        self._group_inputs: dict[tuple[int, int | None], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Write ``key`` and ``value``, return what each query token sees.

        Args:
            layer: model layer.
            query: # [1, H, T, D]
            key: # [1, K, T, D]
            value: # [1, K, T, D]
            scaling: factor of the scores.
            softcap: bound that scaled scores approach; ``None`` for none.

        Returns:
            # [1, T, H, D]
        """
        window = self._windows[layer]
        keys, values = self._arena[layer - self._first_layer]  # [K, C, D] each
        keys.index_copy_(1, self._slots, key[0])
        values.index_copy_(1, self._slots, value[0])
        num_heads, num_tokens, head_dim = query.shape[1:]
        num_kv_heads = key.shape[1]
        out = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)  # [T, H, D]
        for first, span in self._prefills:
            context = slice(span.offset, span.offset + span.past + span.num_tokens)
            mask = self._prefill_mask(first, span, window)
            seen = _attention(
                query[:, :, first : first + span.num_tokens],
                keys[None, :, context],
                values[None, :, context],
                mask=mask,
                is_causal=mask is None,
                scaling=scaling,
                softcap=softcap,
            )  # [1, H, N, D]
            out[first : first + span.num_tokens] = seen[0].transpose(0, 1)
        # One query per KV head and group member: the G heads that share a KV head stand in the place of tokens.
        grouped = query[0].transpose(0, 1).reshape(num_tokens, num_kv_heads, -1, head_dim)  # [T, K, G, D]
        for first, span in self._decodes:
            end = span.offset + span.past + 1
            start = span.offset if window is None else max(span.offset, end - window)
            seen = _attention(
                grouped[first : first + 1],
                keys[None, :, start:end],
                values[None, :, start:end],
                scaling=scaling,
                softcap=softcap,
            )  # [1, K, G, D]
            out[first] = seen.view(num_heads, head_dim)
        for number, members in enumerate(self._groups):
            rows, slots, mask = self._gathered(number, members, window)
            shape = (num_kv_heads, *slots.shape, head_dim)
            seen = _attention(
                grouped[rows],
                keys.index_select(1, slots.flatten()).view(shape).transpose(0, 1),
                values.index_select(1, slots.flatten()).view(shape).transpose(0, 1),
                mask=mask,
                scaling=scaling,
                softcap=softcap,
            )  # [M, K, G, D]
            out[rows] = seen.reshape(-1, num_heads, head_dim)
        return out[None]

    def _prefill_mask(self, first: int, span: Span, window: int | None) -> torch.Tensor | None:
        """What each token of the chunk sees of the context, shape [N, C]; ``None`` for a plain causal chunk."""
        total = span.past + span.num_tokens
        if span.past == 0 and (window is None or window >= total):
            return None
        if (first, window) not in self._masks:
            keys = torch.arange(total, device=self._arena.device)[None, :]
            queries = torch.arange(span.past, total, device=self._arena.device)[:, None]
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            self._masks[first, window] = mask
        return self._masks[first, window]

    def _gathered(
        self, number: int, members: list[tuple[int, Span]], window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of the group in the batch [M], slots that each reads [M, C], which of these are its own [M, 1, 1, C]."""
        if (number, window) not in self._group_inputs:
            device = self._arena.device
            rows = torch.tensor([first for first, _ in members], device=device)
            ends = torch.tensor([span.offset + span.past + 1 for _, span in members], device=device)[:, None]
            lengths = torch.tensor([span.past + 1 for _, span in members], device=device)[:, None]
            if window is not None:
                lengths = lengths.clamp(max=window)
            back = torch.arange(int(lengths.max()), device=device)[None, :]
            is_own = back < lengths
            slots = torch.where(is_own, ends - 1 - back, ends - 1)
            self._group_inputs[number, window] = (rows, slots, is_own[:, None, None, :])
        return self._group_inputs[number, window]


def _groups(decodes: list[tuple[int, Span]]) -> list[list[tuple[int, Span]]]:
    """Split decoding sequences into groups of like context, within ``MAX_PADDING`` and ``MAX_GATHERED_SLOTS``."""
    groups: list[list[tuple[int, Span]]] = []
    used = 0
    for where in sorted(decodes, key=lambda d: -d[1].past):
        length = where[1].past + 1
        if groups:
            longest = groups[-1][0][1].past + 1
            padded = longest * (len(groups[-1]) + 1)
            if padded <= MAX_GATHERED_SLOTS and padded - (used + length) <= MAX_PADDING * padded:
                groups[-1].append(where)
                used += length
                continue
        groups.append([where])
        used = length
    return groups


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of queries [B, H, N, D] over [B, K, C, D]; a mask is true where one is seen, [N, C] or with more axes.

    Torch's own function caps no scores; with a cap they are worked out here, a few query tokens at a time.
    """
    if softcap is None:
        is_grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=is_grouped
        )
    num_heads, num_tokens, context = query.shape[1], query.shape[2], key.shape[2]
    if is_causal:
        mask = torch.ones((num_tokens, context), dtype=torch.bool, device=query.device).tril()
    shared = num_heads // key.shape[1]
    key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    parts = []
    step = max(1, MAX_CAPPED_SCORES // (query.shape[0] * num_heads * context))
    for begin in range(0, num_tokens, step):
        scores = query[:, :, begin : begin + step] @ key.transpose(2, 3) * scaling  # [B, H, step, C]
        scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            seen = mask if mask.shape[-2] == 1 else mask[..., begin : begin + step, :]
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        parts.append(scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - transformers passes it; the batch knows what is seen
    *,
    scaling: float,
    ragged: RaggedBatch,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers' own attention modules call; see ``RaggedBatch.attend``."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    return ragged.attend(layer, query, key, value, scaling=scaling, softcap=softcap), None


def register() -> None:
    """Make ``ATTENTION`` known to transformers; doing so again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, ragged_attention)
