"""Configs of the synthetic models: one small model of every family that the tests compare with ``generate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
VOCAB_SIZE = 320  # bytes and specials, padded to a multiple of 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "dtype": "float32",
}
_WINDOW = 24  # of a sliding-window layer
_ALTERNATING = ["sliding_attention", "full_attention"] * 3


class Preset(NamedTuple):
    """A family by transformers' name of it, and where its config differs from the others'."""

    family: str
    changes: dict[str, Any]

    def config(self) -> PretrainedConfig:
        """The config; loads transformers."""
        import transformers

        config: PretrainedConfig = getattr(transformers, f"{self.family}Config")(
            **{**_COMMON, "architectures": [f"{self.family.removesuffix('Text')}ForCausalLM"], **self.changes}
        )
        return config


_TINY = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
_NANO = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
# Their default caps and multipliers are made stronger, so that one left out would change tokens.
_GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": _WINDOW,
    "tie_word_embeddings": True,
}
_GEMMA |= {"layer_types": _ALTERNATING, "final_logit_softcapping": 12.0}
_GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "residual_multiplier": 0.8, "attention_multiplier": 0.3}
_QWEN3_MOE = {"head_dim": 16, "num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

PRESETS: dict[str, Preset] = {
    "tiny": Preset("Llama", _TINY),
    "nano": Preset("Llama", _NANO),
    "test-llama": Preset("Llama", {"head_dim": 16}),
    "test-mistral": Preset("Mistral", {"head_dim": 16, "sliding_window": _WINDOW}),
    "test-qwen2": Preset("Qwen2", {"tie_word_embeddings": True}),
    # head_dim apart from hidden_size / num_attention_heads, as the family's real models have it
    "test-qwen3": Preset("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "test-gemma2": Preset("Gemma2", _GEMMA | {"attn_logit_softcapping": 6.0}),
    "test-gemma3": Preset("Gemma3Text", _GEMMA),
    "test-phi3": Preset("Phi3", {"sliding_window": _WINDOW, "partial_rotary_factor": 0.5}),
    "test-olmo2": Preset("Olmo2", {}),
    "test-granite": Preset("Granite", _GRANITE | {"tie_word_embeddings": True}),
    "test-smollm3": Preset("SmolLM3", {"tie_word_embeddings": True}),  # every fourth layer has no rotary embedding
    "test-qwen3-moe": Preset("Qwen3Moe", _QWEN3_MOE | {"mlp_only_layers": [1]}),  # one dense layer among the others
    "test-mixtral": Preset("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
