"""Weights that no cache still holds when an iteration begins, as on a machine that several nodes share.

A node that stands in for a machine of its own shares the cache with the others: while it serves, their weights pass
through between any two of its iterations. Measured alone it would find its own still there (3 layers of 12 MB beside a
cache of 32 MB: 15 % faster). So it is measured with copies of its layers that take turns. That costs memory and no
time; reading as much as the cache holds before every iteration costs as much time as two or three layers, and keeps the
memory bus from the others that measure meanwhile.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from helixbench.profiler.stage.stage import Stage

_LEVEL_3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_DEFAULT_BYTES, _MOST_BYTES = 32 << 20, 128 << 20
_TIMES = 1.5  # as much as the cache holds does not drive out all of it
_MOST_COPIES = 32  # of a layer: smaller ones take little time to read anyway, and each copy takes some to make


def layers_in_turn(stage: Stage, layer_counts: Sequence[int]) -> Callable[[], None]:
    """What is to be called before each iteration of the stage's last layers, whose weights it then finds nowhere near.

    Args:
        stage: gets copies of its layers, of each so many that all copies are larger than the cache.
        layer_counts: how many of its last layers iterations run.
    """
    layers = list(stage.layers)
    layer_bytes = sum(weight.numel() * weight.element_size() for weight in layers[0].parameters())
    turns = []
    for index, layer in enumerate(layers):
        fewest = min(count for count in layer_counts if count >= len(layers) - index)
        copies = min(_MOST_COPIES, math.ceil(cold_bytes() / (fewest * layer_bytes)))
        turns.append(itertools.cycle([layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]))

    def next_turn() -> None:
        stage.layers[:] = [next(turn) for turn in turns]

    return next_turn


class CacheFlood:
    """A buffer larger than the cache; reading it leaves nothing else there."""

    def __init__(self) -> None:
        self._buffer = torch.ones(cold_bytes() // 4, dtype=torch.float32)

    def __call__(self) -> None:
        """Read all of it."""
        self._buffer.sum()


def cold_bytes() -> int:
    """Bytes that, once read, leave nothing else in the last-level cache, as the system says its size."""
    try:
        text = _LEVEL_3.read_text().strip()
        cache_bytes = int(text.removesuffix("K")) << 10
    except (OSError, ValueError):
        cache_bytes = _DEFAULT_BYTES
    return min(_MOST_BYTES, int(_TIMES * cache_bytes))
