"""Small synthetic Hugging Face model directories: seeded random weights and a byte-level tokenizer.

No training and no download. The weights are drawn so that greedy output varies and depends on the whole context: plain
small random weights repeat one token for ever, and then a wrong KV cache or position would go unseen.
"""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from helixbench.errors import InputError
from helixbench.profiler.model.directory import write_model_directory
from helixbench.profiler.model.presets import BOS_ID, EOS_ID, PAD_ID, PRESETS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Float32Array = NDArray[np.float32]

NUM_BYTES = 256
# A line for each message, and the beginning of the answer's.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# Spread of the weights. Attention logits near 2.5 let a query pick single positions, and each branch of a layer carries
# about as much as the embedding that it is added to, so that a new token depends on more than the one before it.
EMBEDDING_STD = 0.35
ATTENTION_LOGIT_STD = 2.5
ATTENTION_GAIN = 1.4
MLP_GAIN = 1.0
ROUTER_GAIN = 2.0
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
    config = PRESETS[preset].config()
    write_model_directory(directory, lambda folder: _write_model(folder, config, seed), preset=preset, seed=seed)


def _write_model(directory: Path, config: PretrainedConfig, seed: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)  # whose own draws are replaced
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_draw_parameter(name, parameter.numpy(), config, seed)))
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(directory)  # in the names of the family's checkpoints, each expert by itself
    if shows_progress:
        logging.enable_progress_bar()
    GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID).save_pretrained(directory)
    shutil.copymode(directory / "config.json", directory / "model.safetensors")  # written readable by its owner alone
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


def _draw_parameter(name: str, initial: Float32Array, config: PretrainedConfig, seed: int) -> Float32Array:
    """Values of a parameter by its name. Each has its own stream, so the order of drawing does not matter."""
    module, kind = name.split(".")[-2:]
    shape = initial.shape
    branch = EMBEDDING_STD * math.sqrt(REFERENCE_LAYERS / config.num_hidden_layers)
    if module.endswith("norm"):
        # Families that norm by 1 + weight begin at zero.
        return np.full(shape, _norm_weight(name, module, config, branch), dtype=np.float32) + initial - 1
    if kind == "bias":
        return _scaled(_normal(name, shape, seed), 0.0 if module == "v_proj" else 0.3)
    if module == "embed_tokens":
        return _draw_embedding(shape, config, seed)
    if module == "lm_head":
        return _draw_head(name, shape, seed)
    projection = kind if module == "experts" else module
    if projection == "qkv_proj":
        rows = _scaled(_normal(name, shape, seed), math.sqrt(ATTENTION_LOGIT_STD / shape[1]))
        num_values = shape[0] * config.num_key_value_heads
        num_values //= config.num_attention_heads + 2 * config.num_key_value_heads
        rows[-num_values:] /= math.sqrt(ATTENTION_LOGIT_STD)
        return rows
    gain = {
        "q_proj": math.sqrt(ATTENTION_LOGIT_STD),
        "k_proj": math.sqrt(ATTENTION_LOGIT_STD),
        "v_proj": 1.0,
        "o_proj": ATTENTION_GAIN * branch,
        "gate": ROUTER_GAIN,
        "gate_proj": 1.0,
        "up_proj": 1.0,
        "gate_up_proj": 1.0,
        "down_proj": MLP_GAIN * branch,
    }[projection]
    return _scaled(_normal(name, shape, seed), gain / math.sqrt(shape[-1]))


def _norm_weight(name: str, module: str, config: PretrainedConfig, branch: float) -> float:
    if name == "model.norm.weight":
        # Turns a token's own embedding against its logit: no token calls for itself again and again.
        return -_embedding_factor(config)
    if module in ("q_norm", "k_norm"):
        return math.sqrt(ATTENTION_LOGIT_STD)
    is_after_branch = module == "post_feedforward_layernorm" or (
        module == "post_attention_layernorm" and config.model_type in ("olmo2", "gemma2", "gemma3_text")
    )
    return branch if is_after_branch else 1.0


def _embedding_factor(config: PretrainedConfig) -> float:
    """What the model multiplies embeddings by, which are drawn as much smaller."""
    if config.model_type in ("gemma2", "gemma3_text"):
        return math.sqrt(config.hidden_size)
    return float(getattr(config, "embedding_multiplier", 1.0))


def _draw_embedding(shape: tuple[int, ...], config: PretrainedConfig, seed: int) -> Float32Array:
    rows = _scaled(_normal("model.embed_tokens.weight", shape, seed), EMBEDDING_STD / _embedding_factor(config))
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
