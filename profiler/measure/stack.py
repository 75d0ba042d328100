"""A whole stack of layers against its layers one by one, and against one layer repeated: do times add up, is it cold?

Times of single layers mislead where a layer's weights stay in the cache, as those of a served stage do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from helixbench.profiler.quality import LayerKind, StackTimes
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.stage import Stage

ROUNDS = 5
SEQUENCES = 4
PAST_TOKENS = 16
"""Cached tokens of each sequence; where a sliding window is longer and the cache has room, as many as that sees."""


def time_stack(stage: Stage, *, rounds: int = ROUNDS) -> StackTimes:
    """Time the stage's layers together, each alone in turn, none, and the last one repeated, in interleaved rounds.

    Each layer alone runs after all the others have, so its weights come from where a served stage's come from. The
    clock is the process's CPU time on CPU, which a quota and other processes do not stretch, and the wall clock with
    the device synchronised on CUDA.

    Args:
        stage: neither the first nor the last of its model, with room for ``SEQUENCES`` short requests.
        rounds: the medians are taken over these.
    """
    assert not stage.is_first, "hidden states enter"
    assert not stage.is_last, "hidden states leave"
    items = _items(stage)
    clock = _clock(stage.device)
    count = stage.end - stage.start
    variants = {"whole": stage, "none": stage.with_layers(())}
    variants |= {f"layer {index}": stage.with_layers((index,)) for index in range(count)}
    variants["repeated"] = stage.with_layers((count - 1,) * count)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):  # the first one warms up
        for name, variant in variants.items():
            begin = clock()
            variant.forward(items)
            if number:
                times[name].append(clock() - begin)
    for item in items:
        stage.kv.release(item.request)
    median = {name: float(np.median(values)) for name, values in times.items()}
    single = [median[f"layer {index}"] - median["none"] for index in range(count)]
    return StackTimes(
        num_layers=count,
        batch_tokens=len(items),
        whole_s=median["whole"],
        sum_of_layers_s=median["none"] + sum(single),
        one_repeated_s=median["repeated"],
        kinds=_kinds(stage, single),
        source="process CPU time" if stage.device.type == "cpu" else "wall clock, device synchronised",
    )


def _kinds(stage: Stage, single: list[float]) -> tuple[LayerKind, ...]:
    of_kind: dict[str, list[float]] = {}
    for kind, seconds in zip(stage.layer_kinds, single, strict=True):
        of_kind.setdefault(kind, []).append(seconds)
    return tuple(
        LayerKind(kind=kind, num_layers=len(times), median_s=float(np.median(times)), slowest_s=max(times))
        for kind, times in of_kind.items()
    )


def _items(stage: Stage) -> list[StageItem]:
    generator = torch.Generator().manual_seed(0)
    items = []
    past = min(max(PAST_TOKENS, stage.sliding_window or 0), stage.kv.capacity_tokens // SEQUENCES - 1)
    for number in range(SEQUENCES):
        request = -1 - number  # requests of the server count up from 0
        stage.kv.reserve(request, past + 1)
        hidden = torch.randn((1, stage.hidden_size), generator=generator).to(stage.dtype)
        items.append(
            StageItem(
                request=request,
                past=past,
                num_tokens=1,
                entry_layer=stage.start,
                sample=False,
                inputs=hidden.to(stage.device),
            )
        )
    return items


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised
