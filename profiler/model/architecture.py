"""The model that transformers builds from a config: its parts, and what each decoder layer asks of attention.

Any decoder-only family is run by one path, which relies on what is checked here, on a model without memory: standard
parts that hold all weights, hidden states that go from layer to layer unchanged, and attention that goes through
transformers' interface with nothing but a scale, a window and a cap of the scores.
"""

from __future__ import annotations

import copy
import re
from typing import Any, NamedTuple

import torch
from torch import nn

from helixbench.errors import InputError, first_line

PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")  # of the base model; the head is the causal LM's ``lm_head``
PROBE = "helixbench_probe"
MAX_PROBED_POSITION = 1 << 20  # masks are asked what is seen from a position beyond their window, up to here

# What layers and attention functions are given beside the hidden states, without any influence on what is computed
# here: positions are in the rotary embedding, and nothing is dropped out or cached by transformers.
NEUTRAL = {"position_ids", "position_embeddings", "dropout", "is_causal", "return_dict"}


class LayerAttention(NamedTuple):
    """What the attention of one layer is."""

    num_kv_heads: int
    head_dim: int
    window: int | None  # tokens that one sees back, itself included; None for all


class Architecture(NamedTuple):
    """A model as a stage can run it: every parameter's shape by name, and its place.

    ``layers[i]`` are the names of layer ``i``, ``head`` those of the final norm and the LM head.
    """

    shapes: dict[str, tuple[int, ...]]
    embedding: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    head: tuple[str, ...]
    attention: tuple[LayerAttention, ...]


def build(config: Any, *, attention: str, dtype: torch.dtype) -> Any:
    """The causal LM of that config, without memory for its weights.

    Raises:
        InputError: transformers builds none.
    """
    from transformers import AutoModelForCausalLM

    own = copy.deepcopy(config)
    for name in ("output_router_logits", "output_attentions", "output_hidden_states"):
        if getattr(own, name, False):
            setattr(own, name, False)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(own, dtype=dtype, attn_implementation=attention).eval()
    except Exception as error:  # whatever code of a family raises
        raise _unsupported(
            config, f"transformers builds no causal language model from it ({first_line(error)})"
        ) from error


def base_of(causal: Any) -> Any:
    """The decoder of a causal LM, without its head."""
    return getattr(causal, causal.base_model_prefix)


def describe(config: Any) -> Architecture:
    """Check that a stage can run the model of that config, and describe it.

    Raises:
        InputError: naming the part that is missing, or in the way.
    """
    _register_probe()
    causal = build(config, attention=PROBE, dtype=torch.float32)
    base: Any = getattr(causal, causal.base_model_prefix, None)
    missing = [part for part in PARTS if not isinstance(getattr(base, part, None), nn.Module)]
    missing += [] if isinstance(getattr(causal, "lm_head", None), nn.Module) else ["lm_head"]
    if not missing and not isinstance(getattr(config, "hidden_size", None), int):
        raise _unsupported(config, "its config has no hidden_size")
    if missing:
        raise _unsupported(config, f"{type(causal).__name__} has no part named {missing[0]}")
    if getattr(causal, "_is_stateful", False) or any("Conv" in type(module).__name__ for module in base.modules()):
        raise _unsupported(config, "its layers keep a state beside keys and values")
    prefix = f"{causal.base_model_prefix}."
    shapes = {name: tuple(tensor.shape) for name, tensor in causal.state_dict().items()}
    layers = tuple(
        tuple(name for name in shapes if name.startswith(f"{prefix}layers.{i}.")) for i in range(len(base.layers))
    )
    embedding = tuple(name for name in shapes if name.startswith(f"{prefix}embed_tokens."))
    head = tuple(name for name in shapes if name.startswith((f"{prefix}norm.", "lm_head.")))
    beside = set(shapes) - set(embedding).union(head, *layers)
    if beside:
        raise _unsupported(config, f"it has weights beside the standard parts ({min(beside)})")
    return Architecture(shapes, embedding, layers, head, _probe(config, base))


def dtype_of(causal: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype of a parameter in a model that runs in ``dtype``: transformers keeps some in float32."""
    kept = set(causal._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
    kept |= set(causal._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    return torch.float32 if any(re.search(rf"(^|\.){part}($|\.)", name) for part in kept) else dtype


def fill_buffers(causal: Any, modules: list[nn.Module], *, device: torch.device) -> None:
    """Give buffers that no file holds (rotary frequencies, the scale of embeddings) their values, as transformers does.

    Raises:
        InputError: it gives one of them none.
    """
    for module in (inner for outer in modules for inner in outer.modules()):
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        names = [name for name in names if name in module._non_persistent_buffers_set]
        for name in names:
            empty = torch.empty_like(module.get_buffer(name), device="cpu")
            module._buffers[name] = empty.fill_(torch.nan) if empty.is_floating_point() else empty.fill_(-1)
        with torch.no_grad():
            if names:
                causal._init_weights(module)
        for name in names:
            value = module._buffers[name]
            assert value is not None
            if value.is_floating_point() and value.isnan().any():
                raise _unsupported(causal.config, f"transformers gives buffer {name} no value")
            module._buffers[name] = value.to(device)


def put(causal: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Give parameters, by their names in the model, these tensors; no gradients are kept."""
    for name, tensor in tensors.items():
        path, _, own = name.rpartition(".")
        module = causal.get_submodule(path)
        if own in module._parameters:
            module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[own] = tensor


def _unsupported(config: Any, reason: str) -> InputError:
    return InputError(f"model_type {config.model_type!r} is not supported: {reason}")


class _Window(NamedTuple):
    """Stands in the place of a mask: how far each token sees back, where it is a causal window; others go unused."""

    tokens: int | None
    is_causal: bool


class _Unfit(Exception):  # noqa: N818 - becomes an ``InputError`` with the model's name
    pass


class _Calls:
    """What attention was asked for, in order: (layer that it says it is of, what)."""

    def __init__(self) -> None:
        self.found: list[tuple[int, LayerAttention]] = []


class _Probe(nn.Module):
    """Stands in the place of a layer and runs it; hidden states go on as they came."""

    def __init__(self, layer: nn.Module, index: int, calls: _Calls) -> None:
        super().__init__()
        self.layer, self._index, self._calls = layer, index, calls
        self.attention: LayerAttention | None = None
        self.hidden: Any = None  # what came, and went on

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Any, *arguments: Any, **options: Any) -> Any:
        given = [name for name, value in options.items() if isinstance(value, torch.Tensor) and name not in NEUTRAL]
        if given or any(isinstance(value, torch.Tensor) for value in arguments):
            raise _Unfit(f"its layers are given {given[0] if given else 'more tensors'} beside the hidden states")
        before = len(self._calls.found)
        try:
            self.layer(hidden_states, *arguments, **options)
        except _Unfit as error:
            raise _Unfit(f"layer {self._index}: {error}") from error
        except Exception:  # what comes after attention, such as the choice of experts, may need real values
            if len(self._calls.found) == before:
                raise
        called = self._calls.found[before:]
        if len(called) != 1:
            often = f"attends {len(called)} times" if called else "does not attend"
            raise _Unfit(f"layer {self._index} {often} through transformers' attention interface")
        own_index, self.attention = called[0]
        if own_index != self._index:
            raise _Unfit(f"layer {self._index} calls itself layer {own_index}")
        self.hidden = hidden_states
        return hidden_states


def _probe(config: Any, base: Any) -> tuple[LayerAttention, ...]:
    """Run the base model without memory."""
    calls = _Calls()
    probes = [_Probe(layer, index, calls) for index, layer in enumerate(base.layers)]
    base.layers = nn.ModuleList(probes)
    ends: list[Any] = []
    base.norm = nn.Identity()
    base.norm.register_forward_pre_hook(lambda _, inputs: ends.append(inputs[0]))
    hidden = torch.empty((1, 2, config.hidden_size), device="meta")
    try:
        with torch.no_grad():
            base(
                inputs_embeds=hidden,
                attention_mask=torch.ones((1, 2), dtype=torch.bool),
                use_cache=False,
                ragged=calls,
            )
    except _Unfit as error:
        raise _unsupported(config, str(error)) from error
    except Exception as error:  # whatever code of a family raises that is run otherwise than it expects
        raise _unsupported(config, f"its forward pass does not run layer by layer ({first_line(error)})") from error
    if any(hidden is not probes[0].hidden for hidden in (*(probe.hidden for probe in probes), *ends)):
        raise _unsupported(config, "hidden states are changed between its layers")
    if len(ends) != 1:
        raise _unsupported(config, f"its norm is used {len(ends)} times")
    found = tuple(probe.attention for probe in probes if probe.attention is not None)
    if len({(each.num_kv_heads, each.head_dim) for each in found}) > 1:
        raise _unsupported(config, "its layers have keys of more than one shape")
    return found


def _probed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: Any = None,
    softcap: Any = None,
    ragged: Any = None,
    sliding_window: int | None = None,  # noqa: ARG001 - transformers' own masks, which `generate` obeys, say it
    **options: Any,
) -> Any:
    """An attention function of transformers that notes what it is asked for."""
    options = {name: given for name, given in options.items() if name not in NEUTRAL and given is not None}
    asked = [name for name, given in options.items() if isinstance(given, torch.Tensor) or given not in (False, 0.0)]
    if asked:
        raise _Unfit(f"its attention needs {asked[0]}")
    if not isinstance(ragged, _Calls):
        raise _Unfit("its arguments do not reach its attention")
    if not isinstance(attention_mask, _Window):
        raise _Unfit("it makes an attention mask of its own")
    if not attention_mask.is_causal:
        raise _Unfit("its attention mask is neither causal nor a sliding window")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1] or key.shape[0] != 1 or key.ndim != 4:
        raise _Unfit(f"its keys {tuple(key.shape)} and values {tuple(value.shape)} differ in shape")
    if not isinstance(module.layer_idx, int):
        raise _Unfit("its attention does not know its layer_idx")
    if scaling is None or isinstance(scaling, torch.Tensor) or isinstance(softcap, torch.Tensor):
        raise _Unfit("its scores are not scaled by a constant")
    ragged.found.append((module.layer_idx, LayerAttention(key.shape[1], key.shape[3], attention_mask.tokens)))
    return torch.empty((1, query.shape[2], query.shape[1], key.shape[3]), device="meta"), None


def _window_as_mask(*, mask_function: Any, config: Any, **_: Any) -> _Window:
    """A mask function of transformers that answers with the window: asked at two positions, beyond every window."""
    named = ("sliding_window", "attention_chunk_size", "max_position_embeddings")
    far = 2 + min(MAX_PROBED_POSITION, max(int(getattr(config, name, None) or 0) for name in named))
    zero, keys = torch.tensor(0), torch.arange(far + 4)
    windows = []
    for position in (far, far + 1):
        try:
            visible = mask_function(zero, zero, torch.tensor(position), keys).nonzero().flatten().tolist()
        except RuntimeError:  # it depends on more than the two positions
            return _Window(None, is_causal=False)
        if not visible or visible != list(range(visible[0], position + 1)):
            return _Window(None, is_causal=False)
        windows.append(None if visible[0] == 0 else len(visible))
    return _Window(windows[0], is_causal=windows[0] == windows[1])


def _register_probe() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PROBE, _probed_attention)
    AttentionMaskInterface.register(PROBE, _window_as_mask)
