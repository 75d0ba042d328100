"""Stage: a layer range of a Hugging Face causal LM that runs a batch. Profiled and served alike.

Axes: T tokens of the batch, E hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from helixbench.profiler.cost.model import GATHER_UP_TO_TOKENS
from helixbench.profiler.model.architecture import base_of, build, fill_buffers, put
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage import attention
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.kv_cache import KvCache
from helixbench.profiler.stage.layered import LayeredModel


class StageOutput(msgspec.Struct, frozen=True):
    """What leaves the stage, in the order of ``items``.

    ``hidden`` [T, E] are states after the last layer, ``logits`` [S, V] of the items that sample where the model ends.
    """

    items: tuple[StageItem, ...]
    hidden: torch.Tensor
    logits: torch.Tensor | None


class Stage:
    """Layers ``[start, end)`` with the weights of these alone, and their KV cache.

    The stage that starts at layer 0 holds the embedding, the one that ends the model the final norm and the head.

    Raises:
        InputError: a range that the model does not have, or tensors that are not those of its config.
    """

    def __init__(
        self,
        files: ModelFiles,
        *,
        start: int,
        end: int,
        kv_capacity_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        gather_up_to: int | None = None,
    ) -> None:
        files.require_range(start, end)
        attention.register()
        self.start, self.end, self.dtype, self.device = start, end, dtype, device
        self.is_first, self.is_last = start == 0, end == files.num_layers
        self.vocab_size, self.hidden_size = files.vocab_size, files.hidden_size
        self._gather_up_to = GATHER_UP_TO_TOKENS[device.type] if gather_up_to is None else gather_up_to
        causal = build(files.config, attention=attention.ATTENTION, dtype=dtype)
        base, architecture = base_of(causal), files.architecture
        held = [base.rotary_emb, *base.layers[start:end]]
        held += [base.embed_tokens] if self.is_first else []
        held += [base.norm, causal.lm_head] if self.is_last else []
        fill_buffers(causal, held, device=device)
        for names in files.parameters(start, end):
            put(causal, files.weights.load(names, dtype=dtype, device=device))
        self._weights = {tensor.data_ptr(): tensor for module in held for tensor in module.parameters()}
        assert not any(tensor.is_meta for tensor in self._weights.values()), "a weight was not loaded"
        self._model = LayeredModel(causal)
        self._windows = {i: architecture.attention[i].window for i in range(start, end)}
        self.kv = KvCache(
            num_layers=end - start,
            num_kv_heads=files.num_kv_heads,
            head_dim=files.head_dim,
            capacity_tokens=kv_capacity_tokens,
            dtype=dtype,
            device=device,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that the stage holds."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._weights.values())

    @torch.inference_mode()
    def forward(self, items: Sequence[StageItem]) -> StageOutput:
        """Run one batch. Items come back ordered by entry layer, and ``StageOutput`` follows that order.

        The caller has reserved KV slots for every item's request.
        """
        ordered = tuple(sorted(items, key=lambda item: item.entry_layer))
        hidden: torch.Tensor | None = None  # [T so far, E]
        logits: torch.Tensor | None = None
        entered = 0
        while entered < len(ordered):
            layer = ordered[entered].entry_layer
            joining = [item for item in ordered[entered:] if item.entry_layer == layer]
            entered += len(joining)
            until = ordered[entered].entry_layer if entered < len(ordered) else self.end
            inputs = joining[0].inputs if len(joining) == 1 else torch.cat([item.inputs for item in joining])
            inputs = inputs.to(self.device) if layer == 0 else inputs.to(device=self.device, dtype=self.dtype)
            hidden, logits = self._run(
                ordered[:entered], inputs if hidden is None else torch.cat([hidden, inputs]), layer, until
            )
        assert hidden is not None, "an empty batch"
        return StageOutput(items=ordered, hidden=hidden, logits=logits)

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embedding [T, E] of token ids [T], alone; only where the stage is the model's first."""
        assert self.is_first, "not the first stage"
        return self._model.embed(token_ids.to(self.device))

    @torch.inference_mode()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of hidden states [S, E]; only where the stage is the model's last."""
        assert self.is_last, "not the last stage"
        return self._model.head(hidden)

    def mark_layers(self, mark: Callable[[int], None] | None) -> None:
        """See ``LayeredModel.mark_layers``."""
        self._model.mark_layers(mark)

    def _run(
        self, items: Sequence[StageItem], inputs: torch.Tensor, begin: int, until: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        spans = [attention.Span(self.kv.extent(item.request).offset, item.past, item.num_tokens) for item in items]
        ragged = attention.RaggedBatch(
            spans,
            arena=self.kv.arena,
            first_layer=self.start,
            windows=self._windows,
            gather_up_to=self._gather_up_to,
        )
        ends = itertools.accumulate(item.num_tokens for item in items)
        rows = [end - 1 for item, end in zip(items, ends, strict=True) if item.sample]
        return self._model.run(
            inputs,
            begin,
            until,
            positions=ragged.positions[None],
            rows=rows if until == self.end and self.is_last else None,
            ragged=ragged,
        )


def preload(config: Any) -> None:
    """Import what the first stage would import: seconds of work that is better done before anything is measured."""
    attention.register()
    build(config, attention=attention.ATTENTION, dtype=torch.float32)
