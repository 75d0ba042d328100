"""Which tensors of a checkpoint a model's parameters are made of, and how: as transformers names and converts them.

Most parameters are one tensor of the same name. Others have another prefix, are tied to one another, or are made of
several tensors: the experts of a layer, each in tensors of its own, become one.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from helixbench.errors import InputError, first_line
from helixbench.profiler.model.architecture import dtype_of
from helixbench.profiler.model.checkpoint import Checkpoint, StoredTensor

# Empty tensors of these stand for stored ones when shapes are worked out.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Source(NamedTuple):
    """What parameters are made of: (pattern, tensor) pairs in order, and transformers' converter; ``None`` for none."""

    targets: tuple[str, ...]
    tensors: tuple[tuple[str, str], ...]
    converter: Any

    def convert(self, tensors: dict[str, torch.Tensor], causal: Any) -> dict[str, torch.Tensor]:
        if self.converter is None:
            return {self.targets[0]: tensors[self.tensors[0][1]]}
        own = copy.deepcopy(self.converter)
        for pattern, name in self.tensors:
            own.add_tensor(self.targets[0], name, pattern, tensors[name])
        made = own.convert(self.targets[0], model=causal, config=causal.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class Weights:
    """Parameters of a causal LM, from a checkpoint.

    Args:
        causal: the model, without memory.
        checkpoint: its tensors.

    Raises:
        InputError: a parameter has no tensors, or such of another shape.
    """

    def __init__(self, causal: Any, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._causal = causal
        self._shapes = shapes = {name: tuple(tensor.shape) for name, tensor in causal.state_dict().items()}
        self._source_of = _sources(causal, shapes, checkpoint)
        missing = [name for name in shapes if name not in self._source_of]
        if missing:
            raise InputError(
                f"{checkpoint.directory}: no tensor for {missing[0]}"
                + (f" and {len(missing) - 1} others" if missing[1:] else "")
                + "; the model files are not complete, or not those of its config.json"
            )
        checked: set[tuple[str, ...]] = set()
        for name, source in self._source_of.items():
            if source.targets not in checked:
                checked.add(source.targets)
                self._check(name, source, shapes)

    def tensors_of(self, names: Iterable[str]) -> set[str]:
        """The checkpoint's tensors that these parameters are made of."""
        return {tensor for name in names for _, tensor in self._source_of[name].tensors}

    def num_bytes(self, names: Iterable[str], *, dtype: torch.dtype) -> int:
        """Memory of these parameters in a model that runs in ``dtype``; such that are tied count once."""
        sizes: dict[tuple[str, ...], int] = {}  # targets of a source -> bytes
        for name in names:
            targets = self._source_of[name].targets
            sizes.setdefault(
                targets,
                sum(math.prod(self._shapes[each]) * dtype_of(self._causal, each, dtype).itemsize for each in targets),
            )
        return sum(sizes.values())

    def load(self, names: Iterable[str], *, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """Those parameters, each in memory of its own but for tied ones, which are the same tensor.

        Raises:
            InputError: a file cannot be read.
        """
        made: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}  # targets of a source -> what it gave
        loaded = {}
        for name in names:
            source = self._source_of[name]
            if source.targets not in made:
                # What is made of several tensors is made on the host: the device has no room for it twice.
                place = device if source.converter is None else torch.device("cpu")
                stored = self._checkpoint.load(self.tensors_of([name]), device=place)
                made[source.targets] = {
                    target: value.to(device=device, dtype=dtype_of(self._causal, target, dtype))
                    for target, value in source.convert(stored, self._causal).items()
                }
            values = made[source.targets]
            loaded[name] = values[name] if name in values else values[source.targets[0]]
        return loaded

    def _check(self, name: str, source: _Source, shapes: dict[str, tuple[int, ...]]) -> None:
        stored = {tensor: self._checkpoint.tensors[tensor] for _, tensor in source.tensors}
        first = next(iter(stored))
        try:
            made = source.convert({tensor: _empty(each) for tensor, each in stored.items()}, self._causal)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise InputError(
                f"{self._checkpoint.directory}: tensors {first}, ... do not make {name} ({first_line(error)})"
            ) from error
        for target, value in made.items():
            wanted = shapes.get(target, shapes[name])
            if tuple(value.shape) != wanted:
                what = f"tensor {first}" if len(stored) == 1 else f"{name}, made of {first}, ...,"
                raise InputError(
                    f"{self._checkpoint.directory / stored[first].file}: {what} has the shape {list(value.shape)}, but "
                    f"config.json asks for {list(wanted)}; the files are not those of this config"
                )


def _empty(stored: StoredTensor) -> torch.Tensor:
    return torch.empty(stored.shape, dtype=_DTYPES.get(stored.dtype), device="meta")


def _sources(causal: Any, shapes: dict[str, tuple[int, ...]], checkpoint: Checkpoint) -> dict[str, _Source]:
    """Parameter -> what it is made of, for all that the checkpoint has.

    Source: transformers' ``convert_and_load_state_dict_in_model``, whose parts are called here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(causal)
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = dict.fromkeys(shapes, True)
    collected: dict[str, list[tuple[str, str]]] = {}  # first parameter that they make -> (pattern, tensor)
    for tensor in sorted(checkpoint.tensors, key=_natural):
        name, pattern = rename_source_key(tensor, renamings, converters, causal.base_model_prefix, known)
        if name not in known:
            name, pattern = rename_source_key(tensor, [], [], causal.base_model_prefix, known)
        if name in known:
            collected.setdefault(name, []).append((pattern or tensor, tensor))
    sources: dict[str, _Source] = {}
    for name, tensors in collected.items():
        converter = by_pattern.get(tensors[0][0])
        targets: tuple[str, ...] = (name,)
        if converter is not None:
            first, *others = converter.target_patterns
            targets += tuple(name.replace(first, other) for other in others)
        sources |= dict.fromkeys(targets, _Source(targets, tuple(tensors), converter))
    return _with_tied(causal, sources)


def _with_tied(causal: Any, sources: dict[str, _Source]) -> dict[str, _Source]:
    """Of two tied parameters, one that the checkpoint lacks is the other, whichever of them that is."""
    tied = causal.get_expanded_tied_weights_keys(all_submodels=True)
    for target, source in tied.items():
        for absent, present in ((target, source), (source, target)):
            if absent not in sources and present in sources:
                sources[absent] = sources[present]
    return sources


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Key that sorts numbers in names by value, so that experts come in order."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]
