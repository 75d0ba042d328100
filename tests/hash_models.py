"""Small hash models, and what the reference answers to a request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from helixbench.profiler.model.hash_model import HashConfig, HashModel
from helixbench.profiler.model.hash_reference import reference_tokens
from helixbench.records import save_record

SMALL = HashConfig(
    like="nothing",
    num_hidden_layers=6,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1000,
    dtype="float32",
)


def make_small(directory: Path, **changes: Any) -> HashModel:
    """A hash model of six layers, 256 bytes of activations and 128 of KV cache per token and layer."""
    save_record(directory / "config.json", msgspec.structs.replace(SMALL, **changes))
    return HashModel(directory)


def expected_tokens(model: HashModel, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The reference's output."""
    return reference_tokens(prompt, max_tokens=max_tokens, num_layers=model.num_layers, vocab_size=model.vocab_size)
