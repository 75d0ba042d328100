"""A Hugging Face model on disk: its config, which file holds which tensor, and the families that a stage can run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helixbench.errors import InputError
from helixbench.profiler.cluster import ModelFacts
from helixbench.profiler.model.dtypes import dtype_bytes

if TYPE_CHECKING:
    import torch

# model_type in config.json -> prefix of transformers' class names in models/<model_type>/modeling_<model_type>.py
FAMILIES: dict[str, str] = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

# Kinds of rotary embedding whose frequencies are the same for every sequence. Others change them with the longest one
# of a batch, so that sequences would influence each other.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class ModelFiles:
    """One model directory, opened: ``config`` (transformers') and the place of every tensor.

    Raises:
        InputError: not a model directory, a family that is not supported, or tensor files that are missing or broken.
    """

    def __init__(self, model: str) -> None:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        self.directory = resolve_model(model)
        path = self.directory / "config.json"
        declared = declared_model_type(self.directory)
        if not isinstance(declared, str) or declared not in FAMILIES:
            raise InputError(f"{path}: model_type {declared!r} is not supported; supported: {', '.join(FAMILIES)}")
        self.family: str = declared
        try:
            self.config: Any = AutoConfig.from_pretrained(self.directory, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
            raise InputError(f"{path}: transformers cannot read it ({error})") from error
        if self.num_layers < 1:
            raise InputError(f"{path}: num_hidden_layers is {self.num_layers}; need at least 1")
        rope_type = (self.config.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise InputError(f"{path}: rope_type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
        # tensor name -> file name; older models saved the rotary frequencies, which follow from the config
        self._file_of = {name: file for name, file in self._index().items() if not name.endswith(".inv_freq")}

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.config.vocab_size)

    @property
    def max_sequence_tokens(self) -> int | None:
        """Tokens of a sequence at most; ``None`` where its config names no limit."""
        limit = getattr(self.config, "max_position_embeddings", None)
        return None if limit is None else int(limit)

    @property
    def saved_dtype(self) -> str:
        """Dtype that the model was saved in; float32 where its config does not say."""
        saved = getattr(self.config, "dtype", None)
        return "float32" if saved is None else str(saved).removeprefix("torch.")

    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an output: those of the generation config, which may list several, or else of the config."""
        from transformers import GenerationConfig

        has_own = (self.directory / "generation_config.json").exists()
        source = GenerationConfig.from_pretrained(self.directory, local_files_only=True) if has_own else self.config
        ids = source.eos_token_id
        return frozenset(() if ids is None else ids if isinstance(ids, list | tuple) else (ids,))

    @property
    def head_tensor(self) -> str:
        """Name of the LM head's weight: its own, or the embedding's where the two are tied."""
        if "lm_head.weight" in self._file_of:
            return "lm_head.weight"
        if not self.config.tie_word_embeddings:
            raise InputError(f"{self.directory}: no tensor lm_head.weight, and config.json does not tie it")
        return "model.embed_tokens.weight"

    def names(self, prefix: str) -> list[str]:
        """Tensors whose name begins with ``prefix``, sorted.

        Raises:
            InputError: there are none.
        """
        found = sorted(name for name in self._file_of if name.startswith(prefix))
        if not found:
            raise InputError(f"{self.directory}: no tensor named {prefix}*; the model files are not complete")
        return found

    def load(self, names: list[str], *, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """Those tensors and no others, each in memory of its own."""
        from safetensors import SafetensorError, safe_open

        tensors: dict[str, torch.Tensor] = {}
        for file in sorted({self._file_of[name] for name in names}):
            try:
                with safe_open(self.directory / file, framework="pt") as opened:
                    for name in names:
                        if self._file_of[name] == file:
                            tensors[name] = opened.get_tensor(name).to(device=device, dtype=dtype, copy=True)
            except (OSError, SafetensorError) as error:
                raise InputError(f"{self.directory / file}: cannot be read ({error})") from error
        return tensors

    def num_elements(self, names: list[str]) -> int:
        """Elements of those tensors together, from the files' headers."""
        from safetensors import SafetensorError, safe_open

        total = 0
        for file in sorted({self._file_of[name] for name in names}):
            try:
                with safe_open(self.directory / file, framework="pt") as opened:
                    for name in names:
                        if self._file_of[name] == file:
                            size = 1
                            for extent in opened.get_slice(name).get_shape():
                                size *= extent
                            total += size
            except (OSError, SafetensorError) as error:
                raise InputError(f"{self.directory / file}: cannot be read ({error})") from error
        return total

    def require_range(self, start: int, end: int) -> None:
        """Check that the model has layers ``[start, end)``.

        Raises:
            InputError: it does not.
        """
        if not 0 <= start < end <= self.num_layers:
            raise InputError(f"layer range [{start},{end}): the model has layers [0,{self.num_layers})")

    def range_bytes(self, start: int, end: int, *, dtype: str) -> int:
        """Weights of a stage of layers ``[start, end)`` in that dtype, embedding and head included where it has them.

        Raises:
            InputError: the model does not have these layers.
        """
        self.require_range(start, end)
        names = {name for i in range(start, end) for name in self.names(f"model.layers.{i}.")}
        if start == 0:
            names.add("model.embed_tokens.weight")
        if end == self.num_layers:
            names |= {self.head_tensor, "model.norm.weight"}
        return self.num_elements(sorted(names)) * dtype_bytes(dtype)

    def digest(self) -> str:
        """Digest of the config and of every tensor file's name, size and header: tells models apart in milliseconds."""
        state = hashlib.sha256((self.directory / "config.json").read_bytes())
        for file in sorted(set(self._file_of.values())):
            path = self.directory / file
            with path.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                state.update(f"{file} {path.stat().st_size} ".encode() + opened.read(min(length, 1 << 26)))
                state.update(opened.read(1 << 16))
        return "sha256:" + state.hexdigest()

    def facts(self, *, dtype: str) -> ModelFacts:
        """Sizes of the model in that dtype, from its files."""
        element = dtype_bytes(dtype)
        config = self.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = [self.num_elements(self.names(f"model.layers.{i}.")) for i in range(self.num_layers)]
        return ModelFacts(
            name=self.directory.name,
            num_layers=self.num_layers,
            activation_bytes_per_token=config.hidden_size * element,
            token_bytes=4,
            layer_weight_bytes=max(layers) * element,
            kv_bytes_per_token_per_layer=2 * config.num_key_value_heads * head_dim * element,
            embedding_bytes=self.num_elements(["model.embed_tokens.weight"]) * element,
            head_bytes=self.num_elements([self.head_tensor, "model.norm.weight"]) * element,
            dtype=dtype,
            digest=self.digest(),
        )

    def _index(self) -> dict[str, str]:
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                names = {str(name): str(file) for name, file in weight_map.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{index}: not a safetensors index ({error!r})") from error
            for file in sorted(set(names.values())):
                if Path(file).name != file or not (self.directory / file).is_file():
                    raise InputError(f"{index}: names {file}, which is not beside it; fetch the missing file")
            return names
        return dict(_tensor_names(self.directory / "model.safetensors"))


def _tensor_names(path: Path) -> Iterator[tuple[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            yield from ((name, path.name) for name in opened.keys())  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; need the model's weights as safetensors") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error})") from error


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


def state_for(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under ``prefix``, named as a module of that place names them."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
