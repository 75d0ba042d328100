"""KV cache of a stage: one arena of keys and values, in which every request owns one extent of token slots."""

from __future__ import annotations

import torch

from helixbench.profiler.stage.attention import MAX_GATHERED_SLOTS
from helixbench.profiler.stage.kv_slots import KvSlots


class KvCache(KvSlots):
    """Keys and values of ``num_layers`` layers.

    Axes of ``arena``: layer, key or value, KV head, token slot, head dimension  # [L, 2, H, C, D]
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        capacity_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(capacity_tokens)
        self.arena = torch.zeros(
            (num_layers, 2, num_kv_heads, capacity_tokens, head_dim), dtype=dtype, device=device
        )  # [L, 2, H, C, D]

    def _move(self, source: int, target: int, size: int) -> None:
        """Copy in pieces of no more slots of one layer than an iteration copies, for there is no room for more.

        Source and target may overlap, hence the clone. Pieces go from the front, so none is overwritten too early.
        """
        for layer in self.arena:  # [2, H, C, D]
            for done in range(0, size, MAX_GATHERED_SLOTS):
                piece = min(MAX_GATHERED_SLOTS, size - done)
                begin, end = source + done, target + done
                layer[:, :, end : end + piece] = layer[:, :, begin : begin + piece].clone()
