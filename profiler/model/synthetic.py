"""Small synthetic Hugging Face model directories: seeded random weights and a byte-level tokenizer.

No training and no download. The weights are drawn so that greedy output varies and depends on the whole context: plain
small random weights repeat one token for ever, and then a wrong KV cache or position would go unseen.
"""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from helixbench.errors import InputError
from helixbench.profiler.model.directory import write_model_directory

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Float32Array = NDArray[np.float32]

NUM_BYTES = 256
# A line for each message, and the beginning of the answer's.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
VOCAB_SIZE = 320  # bytes and specials, padded to a multiple of 64

# Spread of the weights. Attention logits near 2.5 let a query pick single positions, and each branch of a layer carries
# about as much as the embedding that it is added to, so that a new token depends on more than the one before it.
EMBEDDING_STD = 0.35
ATTENTION_LOGIT_STD = 2.5
ATTENTION_GAIN = 1.4
MLP_GAIN = 1.0
HEAD_STD = 2.0
REFERENCE_LAYERS = 6
HEAD_EMBEDDING_SHARE = 0.7  # of an untied head's rows: the token's own embedding, which the last norm turns against it
RARE_TOKEN_SCALE = 0.05  # head rows of tokens that are not printable ASCII: never the largest logit, eos among them


def make_model(directory: Path, *, preset: str = "tiny", seed: int = 0) -> None:
    """Write a model directory, whole or not at all; the same preset and seed give the same bytes of weights.

    Args:
        directory: where to; made if missing, replaced if this function made what lies there.
        preset: a key of ``PRESETS``.
        seed: of the weights, at least 0.

    Raises:
        InputError: no such preset, a negative seed, or a directory with other content.
    """
    if preset not in PRESETS:
        raise InputError(f"--preset {preset!r}: no such preset; there are {', '.join(PRESETS)}")
    if seed < 0:
        raise InputError(f"--seed {seed}: need a whole number >= 0")
    config = PRESETS[preset]()
    write_model_directory(directory, lambda folder: _write_model(folder, config, seed), preset=preset, seed=seed)


def _write_model(directory: Path, config: PretrainedConfig, seed: int) -> None:
    from safetensors.numpy import save_file
    from transformers import GenerationConfig

    config.save_pretrained(directory)
    GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID).save_pretrained(directory)
    weights = directory / "model.safetensors"
    save_file(dict(_draw_weights(config, seed)), weights, metadata={"format": "pt"})
    shutil.copymode(directory / "config.json", weights)  # safetensors makes it readable by its owner alone
    _write_tokenizer(directory, max_length=config.max_position_embeddings)


def _write_tokenizer(directory: Path, *, max_length: int) -> None:
    """One token per byte, its id the byte's value; nothing is added to a text or cleaned out of it.

    A special token's own name in a text (``<|eos|>``) is that token. A conversation is written as lines of text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {character: byte for byte, character in enumerate(_byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>", "<|pad|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)


def _byte_alphabet() -> Iterator[str]:
    """The printable character that stands for each byte in a byte-level vocabulary, byte 0 first.

    Printable Latin-1 bytes stand for themselves; the others, in order, for the characters from U+0100 on.
    """
    next_stand_in = 0x100
    for byte in range(NUM_BYTES):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            yield chr(byte)
        else:
            yield chr(next_stand_in)
            next_stand_in += 1


def _draw_weights(config: PretrainedConfig, seed: int) -> Iterator[tuple[str, Float32Array]]:
    """Every parameter of the model by name. Each has its own stream, so the order of drawing does not matter."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        yield name, _draw_parameter(name, tuple(parameter.shape), config, seed)


def _draw_parameter(name: str, shape: tuple[int, ...], config: PretrainedConfig, seed: int) -> Float32Array:
    module, kind = name.split(".")[-2:]
    if module.endswith("norm"):
        return np.full(shape, _norm_weight(name, module), dtype=np.float32)
    if kind == "bias":
        return _scaled(_normal(name, shape, seed), 0.0 if module == "v_proj" else 0.3)
    if module == "embed_tokens":
        return _draw_embedding(shape, config, seed)
    if module == "lm_head":
        return _draw_head(name, shape, seed)
    branch = EMBEDDING_STD * math.sqrt(REFERENCE_LAYERS / config.num_hidden_layers)
    gain = {
        "q_proj": math.sqrt(ATTENTION_LOGIT_STD),
        "k_proj": math.sqrt(ATTENTION_LOGIT_STD),
        "v_proj": 1.0,
        "o_proj": ATTENTION_GAIN * branch,
        "gate_proj": 1.0,
        "up_proj": 1.0,
        "down_proj": MLP_GAIN * branch,
    }[module]
    return _scaled(_normal(name, shape, seed), gain / math.sqrt(shape[1]))


def _norm_weight(name: str, module: str) -> float:
    if name == "model.norm.weight":
        return -1.0  # turns a token's own embedding against its logit: no token calls for itself again and again
    return math.sqrt(ATTENTION_LOGIT_STD) if module in ("q_norm", "k_norm") else 1.0


def _draw_embedding(shape: tuple[int, ...], config: PretrainedConfig, seed: int) -> Float32Array:
    rows = _scaled(_normal("model.embed_tokens.weight", shape, seed), EMBEDDING_STD)
    return _with_rare_tokens(rows) if config.tie_word_embeddings else rows


def _draw_head(name: str, shape: tuple[int, ...], seed: int) -> Float32Array:
    own = _scaled(_normal("model.embed_tokens.weight", shape, seed), HEAD_EMBEDDING_SHARE)
    other = _scaled(_normal(name, shape, seed), math.sqrt(1 - HEAD_EMBEDDING_SHARE**2))
    return _with_rare_tokens(_scaled(own + other, HEAD_STD / math.sqrt(shape[1])))


def _with_rare_tokens(rows: Float32Array) -> Float32Array:
    """Rows [V, hidden] with all but those of printable ASCII made small."""
    scale = np.full((rows.shape[0], 1), RARE_TOKEN_SCALE, dtype=np.float32)
    scale[0x20:0x7F] = 1.0
    return rows * scale


def _normal(name: str, shape: tuple[int, ...], seed: int) -> Float32Array:
    # NumPy rather than torch: its normal draws are the same on every CPU, so machines of one cluster make one model.
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32)


def _scaled(values: Float32Array, factor: float) -> Float32Array:
    return values * np.float32(factor)


def _common(**overrides: Any) -> dict[str, Any]:
    sizes = {
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
    return sizes | overrides


def _tiny() -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        **_common(
            architectures=["LlamaForCausalLM"],
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=16,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=4096,
        )
    )


def _test_llama() -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(**_common(architectures=["LlamaForCausalLM"], head_dim=16))


def _test_mistral() -> PretrainedConfig:
    from transformers import MistralConfig

    return MistralConfig(**_common(architectures=["MistralForCausalLM"], head_dim=16, sliding_window=24))


def _test_qwen2() -> PretrainedConfig:
    from transformers import Qwen2Config

    return Qwen2Config(**_common(architectures=["Qwen2ForCausalLM"], tie_word_embeddings=True))


def _test_qwen3() -> PretrainedConfig:
    from transformers import Qwen3Config

    # head_dim apart from hidden_size / num_attention_heads, as the family's real models have it
    return Qwen3Config(**_common(architectures=["Qwen3ForCausalLM"], head_dim=32, tie_word_embeddings=True))


PRESETS: dict[str, Callable[[], PretrainedConfig]] = {
    "tiny": _tiny,
    "test-llama": _test_llama,
    "test-mistral": _test_mistral,
    "test-qwen2": _test_qwen2,
    "test-qwen3": _test_qwen3,
}
