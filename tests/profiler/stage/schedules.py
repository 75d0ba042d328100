"""Batches that stages run one after the other, made by hand: which sequences bring how many tokens to each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.stage import Stage

CPU = torch.device("cpu")

Part = tuple[int, int]  # (sequence, number of its tokens that come next)


def stage_of(
    directory: Path,
    start: int = 0,
    end: int = 6,
    *,
    dtype: torch.dtype = torch.float32,
    gather_up_to: int | None = None,
    kv_capacity_tokens: int = 512,
) -> Stage:
    return Stage(
        ModelFiles(str(directory)),
        start=start,
        end=end,
        kv_capacity_tokens=kv_capacity_tokens,
        dtype=dtype,
        device=CPU,
        gather_up_to=gather_up_to,
    )


def random_sequences(lengths: Sequence[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0x20, 0x7F, (length,), generator=generator) for length in lengths]


def whole_logits(model: Any, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [N, V] of every position of each sequence, by transformers, one sequence at a time."""
    with torch.inference_mode():
        return [model(sequence[None]).logits[0].float() for sequence in sequences]


Route = Sequence[tuple[Stage, int]]  # stages in order, each with the layer that a sequence enters it at


def run_schedule(
    routes: Sequence[Route], sequences: Sequence[torch.Tensor], schedule: Sequence[Sequence[Part]]
) -> dict[tuple[int, int], torch.Tensor]:
    """Logits at the last token of every part, by (sequence, position); each batch of the schedule runs as one batch.

    ``routes[s]`` is the way of sequence ``s``. A stage runs its parts of a batch at once, whatever came before.
    """
    stages = sorted({stage for route in routes for stage, _ in route}, key=lambda stage: stage.end)  # as they follow
    for stage in stages:
        for number, (route, sequence) in enumerate(zip(routes, sequences, strict=True)):
            if any(passed is stage for passed, _ in route):
                stage.kv.reserve(number, len(sequence))
    done = [0] * len(sequences)
    found: dict[tuple[int, int], torch.Tensor] = {}
    for batch in schedule:
        inputs: list[tuple[int, int, torch.Tensor]] = []  # (sequence, past, ids or hidden states)
        for number, size in batch:
            inputs.append((number, done[number], sequences[number][done[number] : done[number] + size]))
            done[number] += size
        for stage in stages:
            here = [(n, past, x) for n, past, x in inputs if any(passed is stage for passed, _ in routes[n])]
            if not here:
                continue
            entry = {n: layer for n, _, _ in here for passed, layer in routes[n] if passed is stage}
            output = stage.forward([StageItem(n, past, len(x), entry[n], True, x) for n, past, x in here])
            if output.logits is None:
                left = output.hidden.split([item.num_tokens for item in output.items])
                after = {(item.request, item.past): x for item, x in zip(output.items, left, strict=True)}
                inputs = [(n, past, after.get((n, past), x)) for n, past, x in inputs]
            else:
                for item, logits in zip(output.items, output.logits, strict=True):
                    found[item.request, item.past + item.num_tokens - 1] = logits.float()
    assert done == [len(sequence) for sequence in sequences], "the schedule leaves tokens out"
    return found


def distances(found: dict[tuple[int, int], torch.Tensor], whole: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(logits - whole[n][position]).abs().max() for (n, position), logits in found.items()])


def chunks_then_decodes(lengths: Sequence[int], *, chunk: int, decodes: int) -> list[list[Part]]:
    """Prompts in chunks, one sequence starting after the other, each decoding its last tokens beside the others."""
    waiting = [
        [min(chunk, length - decodes - at) for at in range(0, max(0, length - decodes), chunk)]
        + [1] * min(decodes, length)
        for length in lengths
    ]
    schedule: list[list[Part]] = []
    for step in itertools.count():
        batch = [(n, sizes.pop(0)) for n, sizes in enumerate(waiting) if sizes and n <= step]
        if not batch:
            return schedule
        schedule.append(batch)
    raise AssertionError
