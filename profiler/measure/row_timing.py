"""Time a layer's matrix products by their number of rows, for ``row_sizes``."""

from __future__ import annotations

import random
import statistics
import time

import torch
from torch.nn.functional import linear

from helixbench.profiler.cost.padding import RowSizes, candidates, choose_row_sizes
from helixbench.profiler.stage.stage import Stage

_ROUNDS = 9
_MOST_S = 10.0
"""Rounds end early where they would take longer, but for the first three."""


def measure_row_sizes(stage: Stage, *, max_rows: int) -> RowSizes:
    """The sizes that this processor runs the stage's layers with soonest; none (all run as they are) but on CPU.

    A GPU's kernels pad to tiles by themselves.

    Args:
        stage: whose layers' weights are used, one after another.
        max_rows: the largest batch.
    """
    return choose_row_sizes(_times_s(stage, candidates(max_rows))) if stage.device.type == "cpu" else ()


@torch.inference_mode()
def _times_s(stage: Stage, sizes: tuple[int, ...]) -> dict[int, float]:
    """Rows -> median CPU seconds of all products of a layer, over rounds through the shuffled sizes."""
    layers = [
        [module.weight for module in layer.modules() if isinstance(module, torch.nn.Linear)] for layer in stage.layers
    ]
    widths = {weight.shape[1] for weight in layers[0]}
    inputs = {width: torch.randn((max(sizes), width)).to(stage.dtype) for width in widths}
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    order, shuffle = list(sizes), random.Random(0).shuffle
    until, turn = time.monotonic() + _MOST_S, 0
    for number in range(_ROUNDS):
        if number >= 3 and time.monotonic() > until:
            break
        shuffle(order)
        for size in order:
            weights = layers[turn % len(layers)]
            turn += 1
            begin = time.thread_time()
            for weight in weights:
                linear(inputs[weight.shape[1]][:size], weight)
            taken[size].append(time.thread_time() - begin)
    return {size: statistics.median(times) for size, times in taken.items()}
