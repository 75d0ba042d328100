"""Model: a model on disk as profiling, planning and serving see it, whatever its kind; and how one is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from helixbench.profiler.cluster import ModelFacts
from helixbench.profiler.model.files import ModelFiles, declared_model_type, resolve_model
from helixbench.profiler.model.hash_model import HASH_MODEL_TYPE, HashModel


class Model(Protocol):
    """Sizes and identity of a model. Dtypes are given by name; none of this needs torch."""

    directory: Path

    @property
    def num_layers(self) -> int:
        """Decoder layers."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def max_sequence_tokens(self) -> int | None:
        """Tokens of a sequence at most; ``None`` for no limit."""

    @property
    def saved_dtype(self) -> str:
        """Dtype that the model was saved in."""

    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an output."""

    def digest(self) -> str:
        """Tells models apart; equal on every node that holds the same files."""

    def facts(self, *, dtype: str) -> ModelFacts:
        """Sizes of the model in that dtype."""

    def range_bytes(self, start: int, end: int, *, dtype: str) -> int:
        """Weights of a stage of layers ``[start, end)``; ``InputError`` where the model does not have these."""


def open_model(model: str) -> Model:
    """Open a model directory, or the local copy of a hub id. Only a Hugging Face model loads transformers.

    Raises:
        InputError: not a model directory, or a kind of model that is not supported.
    """
    directory = resolve_model(model)
    is_hash_model = declared_model_type(directory) == HASH_MODEL_TYPE
    return HashModel(directory) if is_hash_model else ModelFiles(str(directory))
