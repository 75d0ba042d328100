"""Stage: a layer range of a Hugging Face causal LM that runs a batch. Profiled and served alike.

Axes: T tokens of the batch, E hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from helixbench.errors import InputError
from helixbench.profiler.cost.model import GATHER_UP_TO_TOKENS
from helixbench.profiler.model.files import FAMILIES, ModelFiles, state_for
from helixbench.profiler.stage import attention
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.kv_cache import KvCache


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
        self.start, self.end, self.dtype, self.device = start, end, dtype, device
        self.is_first, self.is_last = start == 0, end == files.num_layers
        self._gather_up_to = GATHER_UP_TO_TOKENS[device.type] if gather_up_to is None else gather_up_to
        config = copy.deepcopy(files.config)
        config._attn_implementation = attention.ATTENTION
        attention.register()
        self._config = config
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        prefix = FAMILIES[files.family]
        modeling = importlib.import_module(f"transformers.models.{files.family}.modeling_{files.family}")
        self._layers = [
            _build(files, getattr(modeling, f"{prefix}DecoderLayer"), (config, i), f"model.layers.{i}.", dtype, device)
            for i in range(start, end)
        ]
        self._rotary = getattr(modeling, f"{prefix}RotaryEmbedding")(config).to(device)
        embedding, head = "model.embed_tokens.weight", files.head_tensor
        wanted = ([embedding] if self.is_first else []) + ([head] if self.is_last else [])
        ends = files.load(sorted(set(wanted)), dtype=dtype, device=device)
        self._embedding = ends[embedding] if self.is_first else None  # [V, E]
        self._head = ends[head] if self.is_last else None  # [V, E]
        self._norm = None
        if self.is_last:
            norm_arguments = (config.hidden_size, config.rms_norm_eps)
            self._norm = _build(
                files, getattr(modeling, f"{prefix}RMSNorm"), norm_arguments, "model.norm.", dtype, device
            )
        self.kv = KvCache(
            num_layers=end - start,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            capacity_tokens=kv_capacity_tokens,
            dtype=dtype,
            device=device,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that the stage holds."""
        modules = [*self._layers, *([self._norm] if self._norm is not None else [])]
        tensors: list[torch.Tensor] = [weight for module in modules for weight in module.parameters()]
        tensors += [weight for weight in (self._embedding, self._head) if weight is not None]
        distinct = {tensor.data_ptr(): tensor for tensor in tensors}  # a tied head is the embedding itself
        return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self._config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self._config.vocab_size)

    @torch.inference_mode()
    def forward(self, items: Sequence[StageItem]) -> StageOutput:
        """Run one batch. Items come back ordered by entry layer, and ``StageOutput`` follows that order.

        The caller has reserved KV slots for every item's request.
        """
        ordered = tuple(sorted(items, key=lambda item: item.entry_layer))
        hidden: torch.Tensor | None = None  # [1, T so far, E]
        entered = 0
        while entered < len(ordered):
            layer = ordered[entered].entry_layer
            joining = [item for item in ordered[entered:] if item.entry_layer == layer]
            entered += len(joining)
            until = ordered[entered].entry_layer if entered < len(ordered) else self.end
            inputs = joining[0].inputs if len(joining) == 1 else torch.cat([item.inputs for item in joining])
            fresh = self.embed(inputs) if layer == 0 else inputs.to(device=self.device, dtype=self.dtype)[None]
            hidden = fresh if hidden is None else torch.cat([hidden, fresh], dim=1)
            hidden = self._run_layers(ordered[:entered], hidden, layer, until)
        assert hidden is not None, "an empty batch"
        logits = self._logits(ordered, hidden[0]) if self.is_last else None
        return StageOutput(items=ordered, hidden=hidden[0], logits=logits)

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states of token ids [T], shape [1, T, E]; only where the stage is the model's first."""
        assert self._embedding is not None, "not the first stage"
        return torch.nn.functional.embedding(token_ids.to(self.device), self._embedding)[None]

    @torch.inference_mode()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of hidden states [S, E]; only where the stage is the model's last."""
        assert self._norm is not None, "not the last stage"
        assert self._head is not None
        logits: torch.Tensor = torch.nn.functional.linear(self._norm(hidden), self._head)
        return logits

    def _run_layers(self, items: Sequence[StageItem], hidden: torch.Tensor, begin: int, until: int) -> torch.Tensor:
        spans = [attention.Span(self.kv.extent(item.request).offset, item.past, item.num_tokens) for item in items]
        ragged = attention.RaggedBatch(
            spans, arena=self.kv.arena, first_layer=self.start, gather_up_to=self._gather_up_to
        )
        positions = ragged.positions[None]  # [1, T]
        rotary = self._rotary(hidden, position_ids=positions)
        for layer in self._layers[begin - self.start : until - self.start]:
            hidden = layer(hidden, position_embeddings=rotary, position_ids=positions, ragged=ragged)
        return hidden

    def _logits(self, items: Sequence[StageItem], hidden: torch.Tensor) -> torch.Tensor:
        assert self._norm is not None
        assert self._head is not None
        rows, end = [], 0
        for item in items:
            end += item.num_tokens
            if item.sample:
                rows.append(end - 1)
        chosen = (
            hidden
            if len(rows) == hidden.shape[0]
            else hidden[torch.tensor(rows, device=hidden.device, dtype=torch.long)]
        )
        logits: torch.Tensor = torch.nn.functional.linear(self._norm(chosen), self._head)
        return logits


def preload() -> None:
    """Import what the first stage would import: seconds of work that is better done before anything is measured."""
    for family in FAMILIES:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    attention.register()


def _build(
    files: ModelFiles,
    module_type: Any,
    arguments: tuple[Any, ...],
    prefix: str,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.nn.Module:
    """A module of transformers with its weights from the files: made without memory, then given the loaded tensors."""
    with torch.device("meta"):
        module: torch.nn.Module = module_type(*arguments)
    state = state_for(files.load(files.names(prefix), dtype=dtype, device=device), prefix)
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise InputError(f"{files.directory}: tensors {prefix}* do not fit {module_type.__name__} ({error})") from error
    return module.eval().requires_grad_(False)
