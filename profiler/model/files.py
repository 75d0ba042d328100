"""A Hugging Face model on disk, opened and checked: its config, its weights and its architecture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helixbench.errors import InputError, first_line
from helixbench.profiler.cluster import ModelFacts
from helixbench.profiler.model.checkpoint import INDEX_DTYPES, PLAIN_DTYPES, Checkpoint
from helixbench.profiler.model.dtypes import dtype_bytes, torch_dtype

if TYPE_CHECKING:
    from helixbench.profiler.model.architecture import Architecture
    from helixbench.profiler.model.weights import Weights

# Kinds of rotary embedding whose frequencies are the same for every sequence. Others change them with the longest one
# of a batch, so that sequences would influence each other.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class ModelFiles:
    """One model directory, opened and checked.

    Every tensor that a stage will need is there, in the shape that the config asks for, in a dtype that is served.

    Attributes:
        config: transformers' config.
        architecture: the model that it stands for.
        weights: its parameters.

    Raises:
        InputError: not a model directory, a family that is not supported, quantised weights, or files that are missing,
            broken or not those of the config.
    """

    def __init__(self, model: str) -> None:
        self.directory = resolve_model(model)
        self.config: Any = _read_config(self.directory)
        self._checkpoint = Checkpoint(self.directory)
        _require_plain(self.directory, self.config, self._checkpoint)
        self._eos_token_ids = _read_eos_token_ids(self.directory, self.config)

        import torch

        from helixbench.profiler.model import architecture
        from helixbench.profiler.model.weights import Weights

        try:
            self.architecture: Architecture = architecture.describe(self.config)
        except InputError as error:
            raise InputError(f"{self.directory / 'config.json'}: {error}") from error
        causal = architecture.build(self.config, attention="eager", dtype=torch.float32)
        self.weights: Weights = Weights(causal, self._checkpoint)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.architecture.layers)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.config.vocab_size)

    @property
    def num_kv_heads(self) -> int:
        """Heads of the cached keys and values."""
        return self.architecture.attention[0].num_kv_heads

    @property
    def head_dim(self) -> int:
        """Width of a cached key or value."""
        return self.architecture.attention[0].head_dim

    @property
    def max_sequence_tokens(self) -> int | None:
        """Tokens of a sequence at most; ``None`` where its config names no limit.

        Scaled rotary embeddings raise it: YaRN to the factor times the length that the model was first trained with,
        linear scaling to the factor times the limit. Where layers have several, the limit takes them into account.
        """
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is None:
            return None
        rope = self.config.rope_parameters or {}
        factor = float(rope.get("factor") or 1.0)
        if rope.get("rope_type") == "yarn":
            return max(int(limit), int(factor * (rope.get("original_max_position_embeddings") or limit)))
        return int(limit * factor) if rope.get("rope_type") == "linear" else int(limit)

    @property
    def saved_dtype(self) -> str:
        """Dtype that the model was saved in; float32 where its config does not say."""
        saved = getattr(self.config, "dtype", None)
        return "float32" if saved is None else str(saved).removeprefix("torch.")

    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an output: those of the generation config, which may list several, or else of the config."""
        return self._eos_token_ids

    def require_range(self, start: int, end: int) -> None:
        """Check that the model has layers ``[start, end)``.

        Raises:
            InputError: it does not.
        """
        if not 0 <= start < end <= self.num_layers:
            raise InputError(f"layer range [{start},{end}): the model has layers [0,{self.num_layers})")

    def parameters(self, start: int, end: int) -> Iterator[tuple[str, ...]]:
        """Names of the parameters that a stage of layers ``[start, end)`` holds, those of a layer together."""
        has_embedding, has_head = start == 0, end == self.num_layers
        ends = (self.architecture.embedding if has_embedding else ()) + (self.architecture.head if has_head else ())
        if ends:
            yield ends  # together, for they may be tied
        yield from self.architecture.layers[start:end]

    def range_bytes(self, start: int, end: int, *, dtype: str) -> int:
        """Weights of a stage of layers ``[start, end)`` in that dtype, embedding and head included where it has them.

        Raises:
            InputError: the model does not have these layers.
        """
        self.require_range(start, end)
        return sum(self._bytes(names, dtype) for names in self.parameters(start, end))

    def digest(self) -> str:
        """Digest of the config and of samples of every tensor: tells models apart in a moment."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        content = (self.directory / "config.json").read_bytes() + self._checkpoint.digest().encode()
        return "sha256:" + hashlib.sha256(content).hexdigest()

    def facts(self, *, dtype: str) -> ModelFacts:
        """Sizes of the model in that dtype, from its files; of a layer, where they differ, those of the largest."""
        element = dtype_bytes(dtype)
        return ModelFacts(
            name=self.directory.name,
            num_layers=self.num_layers,
            activation_bytes_per_token=self.hidden_size * element,
            token_bytes=4,
            layer_weight_bytes=max(self._bytes(names, dtype) for names in self.architecture.layers),
            kv_bytes_per_token_per_layer=2 * self.num_kv_heads * self.head_dim * element,
            embedding_bytes=self._bytes(self.architecture.embedding, dtype),
            head_bytes=self._bytes(self.architecture.head, dtype),
            dtype=dtype,
            digest=self.digest(),
        )

    def _bytes(self, names: tuple[str, ...], dtype: str) -> int:
        """Memory of these parameters; such that are one tensor count once."""
        return self.weights.num_bytes(names, dtype=torch_dtype(dtype))


def _read_config(directory: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = directory / "config.json"
    if not isinstance(declared := declared_model_type(directory), str):
        raise InputError(f"{path}: model_type {declared!r} is not supported: need the name of a family")
    try:
        config: Any = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"{path}: transformers cannot read it ({first_line(error)})") from error
    num_layers = getattr(config, "num_hidden_layers", 1)
    if num_layers < 1:
        raise InputError(f"{path}: num_hidden_layers is {num_layers}; need at least 1")
    for rope_type in _rope_types(config):
        if rope_type not in ROPE_TYPES:
            raise InputError(f"{path}: rope_type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    return config


def _rope_types(config: Any) -> list[str]:
    """Kinds of rotary embedding: one, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    return [part.get("rope_type", "default") for part in parts]


def _require_plain(directory: Path, config: Any, checkpoint: Checkpoint) -> None:
    """Refuse quantised weights, which a stage does not run; what they take is in the files' headers."""
    stored = checkpoint.dtypes()
    quantised = stored.keys() - {*PLAIN_DTYPES, *INDEX_DTYPES}
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if quantised or method:
        sizes = ", ".join(f"{size / 1e6:.4g} MB of {name}" for name, size in stored.items())
        raise InputError(
            f"{directory}: quantised weights ({f'{method}; ' if method else ''}{sizes}) are not served; use the "
            "model's checkpoint in bfloat16, float16 or float32"
        )


def _read_eos_token_ids(directory: Path, config: Any) -> frozenset[int]:
    from transformers import GenerationConfig

    path = directory / "generation_config.json"
    try:
        source = GenerationConfig.from_pretrained(directory, local_files_only=True) if path.exists() else config
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: transformers cannot read it ({first_line(error)})") from error
    ids = source.eos_token_id
    found = () if ids is None else ids if isinstance(ids, list | tuple) else (ids,)
    if not all(isinstance(each, int) for each in found):
        raise InputError(
            f"{path if path.exists() else directory / 'config.json'}: eos_token_id {ids!r}: need token ids"
        )
    return frozenset(found)


def declared_model_type(directory: Path) -> object:
    """``model_type`` of a model directory's ``config.json``; ``None`` where it has none.

    Raises:
        InputError: there is no such file, or it is not a JSON object.
    """
    path = directory / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; need a Hugging Face model directory") from error
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a readable JSON object ({error})") from error


def resolve_model(model: str) -> Path:
    """The local directory of a model given as a path or as a hub id; the latter is fetched where it is not cached.

    Raises:
        InputError: no such directory, and nothing that the hub gives.
    """
    path = Path(model)
    if path.is_dir():
        return path.resolve()
    if path.exists() or model.startswith((".", "/")) or model.count("/") != 1:
        raise InputError(f"--model {model}: no such directory; give a Hugging Face model directory or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"--model {model}: no such directory, and the hub did not give it ({error})") from error
