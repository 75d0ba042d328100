"""Hash models: the sizes of a published model, and a hash in place of its weights.

A node that serves one accounts for memory and sends bytes as for the published model, but computes next to nothing.
Each token's hidden state is one 64-bit word, which every layer mixes with what it cached of the request's earlier
tokens. So any token depends on all layers having run once, in order, on the right cache: see ``hash_reference``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final, Literal

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import ModelFacts
from helixbench.profiler.model.directory import write_model_directory
from helixbench.profiler.model.dtypes import dtype_bytes
from helixbench.records import load_record, save_record

HASH_MODEL_TYPE: Final = "helixbench-hash"
WORD_BYTES = 8

Wire = Literal["full", "small"]


class HashConfig(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.hash-model/1",
):
    """``config.json`` of a hash model; sizes are named as Hugging Face names them.

    Attributes:
        like: the published model whose sizes these are.
        dtype: of its weights, KV cache and activations.
        wire: ``full`` pads a hidden state to the activation's size on its way between nodes, ``small`` sends its word.
    """

    like: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    dtype: str
    wire: Wire = "full"
    model_type: Literal["helixbench-hash"] = HASH_MODEL_TYPE

    def __post_init__(self) -> None:
        sizes = (self.num_hidden_layers, self.hidden_size, self.intermediate_size, self.num_attention_heads)
        if min(*sizes, self.num_key_value_heads, self.vocab_size) < 1:
            raise ValueError("sizes: need whole numbers >= 1")
        if self.hidden_size % self.num_attention_heads or self.hidden_size < WORD_BYTES:
            raise ValueError(f"hidden_size: need at least {WORD_BYTES} and a multiple of num_attention_heads")
        dtype_bytes(self.dtype)


class HashModel:
    """A directory with a hash model, opened; the same interface as ``ModelFiles``.

    Raises:
        InputError: its ``config.json`` cannot be read or is not a hash model's.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / "config.json"
        self.config = load_record(self._path, HashConfig)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.config.num_hidden_layers

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.config.vocab_size

    @property
    def max_sequence_tokens(self) -> None:
        """No limit: positions are numbers."""
        return None

    @property
    def saved_dtype(self) -> str:
        """The published model's dtype."""
        return self.config.dtype

    def eos_token_ids(self) -> frozenset[int]:
        """None: an output ends at its length, or at a stop token of the request's own."""
        return frozenset()

    def digest(self) -> str:
        """Digest of the config, which is all there is."""
        return "sha256:" + hashlib.sha256(self._path.read_bytes()).hexdigest()

    def range_bytes(self, start: int, end: int, *, dtype: str) -> int:
        """Weights of layers ``[start, end)`` of the published model, embedding and head included where they belong.

        Raises:
            InputError: the model does not have these layers.
        """
        if not 0 <= start < end <= self.num_layers:
            raise InputError(f"layer range [{start},{end}): the model has layers [0,{self.num_layers})")
        ends = (self._embedding_elements if start == 0 else 0) + (self._head_elements if end == self.num_layers else 0)
        return ((end - start) * self._layer_elements + ends) * dtype_bytes(dtype)

    def facts(self, *, dtype: str) -> ModelFacts:
        """Sizes of the published model in that dtype; on a small wire only a hidden state's word crosses a link."""
        element = dtype_bytes(dtype)
        return ModelFacts(
            name=self.directory.name,
            num_layers=self.num_layers,
            activation_bytes_per_token=self.state_bytes(dtype=dtype),
            token_bytes=4,
            layer_weight_bytes=self._layer_elements * element,
            kv_bytes_per_token_per_layer=2 * self._kv_size * element,
            embedding_bytes=self._embedding_elements * element,
            head_bytes=self._head_elements * element,
            dtype=dtype,
            digest=self.digest(),
        )

    def state_bytes(self, *, dtype: str) -> int:
        """Bytes of one token's hidden state on a link between two nodes."""
        return self.config.hidden_size * dtype_bytes(dtype) if self.config.wire == "full" else WORD_BYTES

    @property
    def _kv_size(self) -> int:
        return self.config.num_key_value_heads * (self.config.hidden_size // self.config.num_attention_heads)

    @property
    def _layer_elements(self) -> int:
        """Query and output, key and value, gate, up and down projections, and two norms."""
        hidden = self.config.hidden_size
        return (
            2 * hidden * hidden + 2 * hidden * self._kv_size + 3 * hidden * self.config.intermediate_size + 2 * hidden
        )

    @property
    def _embedding_elements(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    @property
    def _head_elements(self) -> int:
        """The LM head, not tied to the embedding, and the norm before it."""
        return (self.config.vocab_size + 1) * self.config.hidden_size


def make_hash_model(directory: Path, *, like: str, num_layers: int | None = None, wire: Wire = "full") -> HashModel:
    """Write a hash model, whole or not at all, and open it.

    Args:
        directory: where to; created if missing, replaced if helixbench made what lies there.
        like: a key of ``PUBLISHED_SIZES``.
        num_layers: in place of the published number.
        wire: see ``HashConfig``.

    Raises:
        InputError: no such model, no layers, or a directory with other content.
    """
    if like not in PUBLISHED_SIZES:
        raise InputError(f"--like {like}: sizes not known; known models: {', '.join(PUBLISHED_SIZES)}")
    if num_layers is not None and num_layers < 1:
        raise InputError(f"--layers {num_layers}: need at least 1")
    sizes = PUBLISHED_SIZES[like]
    config = HashConfig(
        like=like,
        num_hidden_layers=num_layers or sizes.layers,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocab,
        dtype=sizes.dtype,
        wire=wire,
    )
    write_model_directory(directory, lambda folder: save_record(folder / "config.json", config), preset=like)
    return HashModel(directory.resolve())


class _Sizes(msgspec.Struct, frozen=True):
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    dtype: str = "float16"


# From each model's config.json on the Hugging Face hub; all are of one architecture, without biases or tied heads.
PUBLISHED_SIZES: dict[str, _Sizes] = {
    "llama1-30b": _Sizes(60, 6656, 17920, 52, 52, 32000),
    "llama2-7b": _Sizes(32, 4096, 11008, 32, 32, 32000),
    "llama2-13b": _Sizes(40, 5120, 13824, 40, 40, 32000),
    "llama2-70b": _Sizes(80, 8192, 28672, 64, 8, 32000),
    "llama3-8b": _Sizes(32, 4096, 14336, 32, 8, 128256, "bfloat16"),
    "llama3-70b": _Sizes(80, 8192, 28672, 64, 8, 128256, "bfloat16"),
    "mistral-7b": _Sizes(32, 4096, 14336, 32, 8, 32000, "bfloat16"),
}
