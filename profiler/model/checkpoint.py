"""The safetensors files of a model directory: which file holds which tensor, its dtype and shape, and its content.

Headers are read once and without torch; see https://huggingface.co/docs/safetensors for the format.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from helixbench.errors import InputError

if TYPE_CHECKING:
    import torch

WHOLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")  # as headers name them; a stage converts them to its own
INDEX_DTYPES = ("I64", "BOOL")  # of positions and masks that older checkpoints hold beside the weights

SAMPLE_BYTES = 4096
SAMPLES = 4  # of each tensor, evenly spread; the digest reads a smaller tensor whole


class StoredTensor(NamedTuple):
    """A tensor's place: ``num_bytes`` bytes from ``offset`` of a file in the directory."""

    file: str
    dtype: str  # as the header names it: F32, BF16, F8_E4M3, ...
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class Checkpoint:
    """Tensors of a model directory. A whole file is taken before an index beside it, as transformers does.

    Attributes:
        tensors: name -> its place, without saved rotary frequencies, which follow from the config.

    Raises:
        InputError: files are missing, or broken.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        for file, names in self._files().items():
            found = _read_header(directory / file)
            for name in found if names is None else names:
                if name not in found:
                    raise InputError(f"{directory / INDEX_NAME}: places {name} in {file}, which does not have it")
                if not name.endswith(".inv_freq"):
                    self.tensors[name] = found[name]

    def load(self, names: Iterable[str], *, device: torch.device) -> dict[str, torch.Tensor]:
        """Those tensors and no others, as they are stored, each in memory of its own.

        Raises:
            InputError: a file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        loaded: dict[str, torch.Tensor] = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(self.directory / file, framework="pt") as opened:
                    for name in wanted:
                        loaded[name] = opened.get_tensor(name).to(device=device, copy=True)
            except (OSError, SafetensorError) as error:
                raise InputError(f"{self.directory / file}: cannot be read ({error})") from error
        return loaded

    def dtypes(self) -> dict[str, int]:
        """Bytes of the tensors by dtype, as headers name it, most first."""
        counted: Counter[str] = Counter()
        for stored in self.tensors.values():
            counted[stored.dtype] += stored.num_bytes
        return dict(counted.most_common())

    def digest(self) -> str:
        """Digest of every tensor's name, dtype and shape and of samples of its content, however they are sharded.

        Raises:
            InputError: a file cannot be read.
        """
        state = hashlib.sha256()
        opened: dict[str, BinaryIO] = {}
        with ExitStack() as stack:
            for name, stored in sorted(self.tensors.items()):
                state.update(f"{name} {stored.dtype} {stored.shape} ".encode())
                path = self.directory / stored.file
                try:
                    if stored.file not in opened:
                        opened[stored.file] = stack.enter_context(path.open("rb"))
                    for begin, size in _samples(stored.num_bytes):
                        opened[stored.file].seek(stored.offset + begin)
                        state.update(opened[stored.file].read(size))
                except OSError as error:
                    raise InputError(f"{path}: cannot be read ({error})") from error
        return state.hexdigest()

    def _files(self) -> dict[str, list[str] | None]:
        """File -> the tensors that the index places in it; ``None`` for all that it has."""
        index = self.directory / INDEX_NAME
        if (self.directory / WHOLE_NAME).is_file() or not index.exists():
            return {WHOLE_NAME: None}
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            places = [(str(name), str(file)) for name, file in weight_map.items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not a safetensors index ({error!r})") from error
        files: dict[str, list[str] | None] = {}
        for name, file in places:
            if file not in files and (Path(file).name != file or not (self.directory / file).is_file()):
                raise InputError(f"{index}: names {file}, which is not beside it; fetch the missing file")
            names = files.setdefault(file, [])
            assert names is not None
            names.append(name)
        return files


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a file; the file must be as long as its header says."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(file_bytes - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in {file_bytes}")
            header: dict[str, Any] = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(
                path.name,
                str(entry["dtype"]),
                tuple(int(extent) for extent in entry["shape"]),
                8 + length + int(entry["data_offsets"][0]),
                int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
            )
            for name, entry in header.items()
        }
        needed = max((stored.offset + stored.num_bytes for stored in tensors.values()), default=8 + length)
        if needed > file_bytes:
            raise ValueError(f"{file_bytes} bytes of {needed}")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; need the model's weights as safetensors") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error})") from error
    return tensors


def _samples(num_bytes: int) -> list[tuple[int, int]]:
    """Parts (begin, size) of a tensor that its digest reads: the whole of a small one, else its ends and between."""
    if num_bytes <= SAMPLES * SAMPLE_BYTES:
        return [(0, num_bytes)]
    last = num_bytes - SAMPLE_BYTES
    return [(last * number // (SAMPLES - 1), SAMPLE_BYTES) for number in range(SAMPLES)]
