"""Measured costs from others' timing tables: milliseconds of one decoder layer by tokens in the batch.

Two files for each type of device: ``*_<device>_prompt.csv`` (whole prompts) and ``*_<device>_decode.csv`` (one token
for each sequence), rows ``tokens,ms``. What the tables do not time - the server's own work, embedding, head, context -
is not in the cost, and ``source`` says so. Nor do they say what memory an engine leaves for KV caches: that is assumed,
and ``source`` says what was.
"""

from __future__ import annotations

import csv
from pathlib import Path

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile, Device
from helixbench.profiler.cost.fit import fit_cost
from helixbench.profiler.cost.measured import CostSample, MeasuredCost
from helixbench.profiler.cost.model import BatchShape

HELD_OUT_EVERY = 5
MAX_BATCH_TOKENS = 2048
"""Of the server that the profile stands for; the published one takes prompts of up to 2048 tokens whole."""

MEMORY_UTILIZATION = 0.9
"""Share of a device's memory that an engine uses at all; vLLM's default (``gpu_memory_utilization``)."""

WORKSPACE_BYTES = 3e9
"""Of that, what is neither weights nor KV cache: the CUDA context, captured graphs, libraries, and the activations of
the largest iteration. An assumption: KV caches that were published for LLaMA-2 70B on A100, L4 and T4, by layers held,
leave 2.7 to 3.7e9 where a layer is taken as 1.53e9 bytes."""

WHOLE_MEMORY_FACT = "memory_before_utilization_bytes"
"""Among a device's facts: its memory before the utilization was taken off."""


def with_imported_costs(
    cluster: ClusterProfile,
    tables: Path,
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    memory_utilization: float = MEMORY_UTILIZATION,
    workspace_bytes: float = WORKSPACE_BYTES,
) -> ClusterProfile:
    """The cluster with every node's capacity table replaced by a cost fitted to the timing tables of its device.

    Args:
        cluster: nodes by name, device and memory; a node's device name finds its tables, in any case.
        tables: folder of the CSV files.
        max_batch_tokens: most tokens of one iteration.
        memory_utilization: share of each device's memory that the engine uses: the rest is taken off ``memory_bytes``.
        workspace_bytes: what each engine keeps of that beside weights and KV cache.

    Raises:
        InputError: a device without tables, a table that cannot be read, or memory out of range.
    """
    if not 0 < memory_utilization <= 1:
        raise InputError(f"--memory-utilization {memory_utilization}: need a share of the memory, above 0 and up to 1")
    costs: dict[str, MeasuredCost] = {}
    nodes = []
    for node in cluster.nodes:
        device = node.device
        if device.name not in costs:
            costs[device.name] = import_cost(
                tables, device.name, max_batch_tokens=max_batch_tokens, workspace_bytes=workspace_bytes
            )
        nodes.append(
            msgspec.structs.replace(
                node,
                device=_used(device, memory_utilization, workspace_bytes=workspace_bytes),
                capacity_tokens_per_s=None,
                cost=costs[device.name],
            )
        )
    return msgspec.structs.replace(cluster, nodes=tuple(nodes))


def _used(device: Device, utilization: float, *, workspace_bytes: float) -> Device:
    """The device with the share of its memory that an engine uses; one that was cut before is cut from the whole."""
    whole = float(device.facts.get(WHOLE_MEMORY_FACT, device.memory_bytes))
    used = utilization * whole
    if not 0 <= workspace_bytes < used:
        raise InputError(
            f"--workspace-bytes {workspace_bytes:g}: need at least 0, and less than the {used:g} that the engine uses "
            f"of a {device.name}"
        )
    return msgspec.structs.replace(device, memory_bytes=used, facts={**device.facts, WHOLE_MEMORY_FACT: whole})


def import_cost(
    tables: Path,
    device: str,
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    held_out_every: int = HELD_OUT_EVERY,
    workspace_bytes: float = WORKSPACE_BYTES,
) -> MeasuredCost:
    """A device's cost from its two tables.

    Args:
        tables: folder of the CSV files.
        device: as the files name it, in any case.
        max_batch_tokens: rows of more tokens are left out.
        held_out_every: every so manieth row of each table is kept out of the fit.
        workspace_bytes: memory beside weights and KV cache.

    Raises:
        InputError: no such tables, or one that cannot be read.
    """
    prompt_path, decode_path = _table_path(tables, device, "prompt"), _table_path(tables, device, "decode")
    samples = [
        *_samples(prompt_path, is_prompt=True, max_tokens=max_batch_tokens, held_out_every=held_out_every),
        *_samples(decode_path, is_prompt=False, max_tokens=max_batch_tokens, held_out_every=held_out_every),
    ]
    cost = fit_cost(
        [*samples, *(_stacked(sample) for sample in samples)],
        workspace_bytes=workspace_bytes,
        max_batch_tokens=max_batch_tokens,
        has_tiles=True,
        lets_few_go=True,
        source=(
            f"imported from {prompt_path.name} and {decode_path.name}, which time one decoder layer; layers are taken "
            "to add up, and the server's own time, embedding, head and the length of the context are not in it; its "
            f"workspace of {workspace_bytes / 1e9:.3g} GB is an assumption"
        ),
    )
    return msgspec.structs.replace(cost, samples=tuple(samples))


STACKED_LAYERS = 8


def _stacked(sample: CostSample) -> CostSample:
    """The sample of several layers that the table implies: without it, nothing says that its time is per layer."""
    return msgspec.structs.replace(sample, num_layers=STACKED_LAYERS, median_s=STACKED_LAYERS * sample.median_s)


def _table_path(tables: Path, device: str, phase: str) -> Path:
    wanted = f"_{device.lower()}_{phase}.csv"
    found = sorted(path for path in tables.glob("*.csv") if f"_{path.name.lower()}".endswith(wanted))
    if len(found) != 1:
        count = "no" if not found else f"{len(found)}"
        raise InputError(f"{tables}: {count} files named *{wanted}; need one for each device, with rows `tokens,ms`")
    return found[0]


def _samples(path: Path, *, is_prompt: bool, max_tokens: int, held_out_every: int) -> list[CostSample]:
    samples: list[CostSample] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                tokens, seconds = _row(row, origin=f"{path}:{number}")
                if tokens == 0 or tokens > max_tokens:
                    continue
                is_held_out = len(samples) % held_out_every == held_out_every - 1
                samples.append(_sample(tokens, seconds, is_prompt=is_prompt, held_out=is_held_out))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV table ({error})") from error
    if len(samples) < held_out_every:
        raise InputError(f"{path}: {len(samples)} usable rows; need at least {held_out_every}")
    return samples


def _row(row: list[str], *, origin: str) -> tuple[float, float]:
    try:
        tokens, milliseconds = (float(value) for value in row)
    except ValueError as error:
        raise InputError(f"{origin}: need two numbers, tokens and milliseconds, got {','.join(row)!r}") from error
    if tokens < 0 or milliseconds < 0:
        raise InputError(f"{origin}: need tokens and milliseconds >= 0, got {','.join(row)!r}")
    return tokens, milliseconds / 1000


def _sample(tokens: float, seconds: float, *, is_prompt: bool, held_out: bool) -> CostSample:
    shape = BatchShape(prefill_tokens=tokens, prefill_chunks=1.0) if is_prompt else BatchShape(decode_tokens=tokens)
    return CostSample(
        num_layers=1, first=False, last=False, batch=shape, median_s=seconds, spread=0.0, repeats=1, held_out=held_out
    )
