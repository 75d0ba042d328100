"""The grid of batches over which a stage is timed by ``sampler``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, TypeAlias

import msgspec

from helixbench.profiler.cost.knots import TILE_TOKENS
from helixbench.profiler.cost.model import BatchShape
from helixbench.profiler.stage.attention import MAX_GATHERED_SLOTS

MOST_TILES = 4
"""Tile edges that are measured: beyond them, a step is a small part of the time."""

_FEW_SIZES = 5
"""Batch sizes on fewer than all layers, which only determine the cost of an iteration besides its layers: many blocks
of few points give smaller errors than three blocks of many."""

_Batch: TypeAlias = tuple[tuple[tuple[int, int], ...], tuple[int, ...]]  # (past, new tokens) of chunks, past of decodes
Part: TypeAlias = Literal["layers", "embedding", "head"]


class GridPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One batch to time. ``prefills`` are (past, new tokens), ``decodes`` the tokens cached before each new one."""

    part: Part
    num_layers: int
    prefills: tuple[tuple[int, int], ...] = ()
    decodes: tuple[int, ...] = ()
    held_out: bool = False

    @property
    def kv_tokens(self) -> int:
        """KV slots that the batch needs."""
        return sum(past + new for past, new in self.prefills) + sum(past + 1 for past in self.decodes)

    @property
    def num_tokens(self) -> int:
        """New tokens."""
        return sum(new for _, new in self.prefills) + len(self.decodes)

    @property
    def shape(self) -> BatchShape:
        """The batch in the counts of the cost model."""
        return BatchShape(
            prefill_tokens=sum(new for _, new in self.prefills),
            prefill_chunks=len(self.prefills),
            prefill_pairs=sum(new * past + new * (new + 1) / 2 for past, new in self.prefills),
            decode_tokens=len(self.decodes),
            decode_context_tokens=sum(past + 1 for past in self.decodes),
            sampled_tokens=len(self.prefills) + len(self.decodes),
        )


Iterate: TypeAlias = Callable[[], None]  # runs one iteration
Runner: TypeAlias = Callable[[GridPoint], AbstractContextManager[Iterate]]


def grid(
    *,
    layer_counts: tuple[int, ...],
    max_batch_tokens: int,
    max_context_tokens: int,
    max_kv_tokens: int,
    has_tiles: bool = False,
) -> tuple[GridPoint, ...]:
    """Batches that separate the cost model's terms, and mixed ones, some of them held out.

    Args:
        layer_counts: numbers of layers to run: all of ``grid`` with the most, less with fewer.
        max_batch_tokens: largest batch.
        max_context_tokens: longest context.
        max_kv_tokens: batches that need more KV slots are left out.
        has_tiles: also decode on both sides of each tile edge, where the time of a GPU may jump.
    """
    short, long = max(1, max_context_tokens // 16), max_context_tokens
    middle = max_context_tokens // 4
    full = max_batch_tokens
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size <= full]
    if has_tiles:
        edges = (TILE_TOKENS // 2, *range(TILE_TOKENS, MOST_TILES * TILE_TOKENS + 1, TILE_TOKENS))
        sizes = sorted({*sizes, *(size for edge in edges for size in (edge, edge + 1) if size <= full)})
    fitted: list[_Batch] = [((), (short,) * size) for size in sizes]
    fitted += [((), (long,) * size) for size in (1, 2, 4, 16, 64)]
    fitted += [(((0, size),), ()) for size in _up_to(full, (8, 32, 64, 128, 256, 512, 1024, 2048, full))]
    fitted += [(((long - full // 2, full // 2),), ()), (((0, full // 4),) * 4, ())]
    fitted += [((), (middle,) * size) for size in (2, 4, 8, 16)]
    fitted += [(((0, full // 2),), (middle,) * (full // 8)), (((0, full // 4),), (short,) * (full // 4))]
    fitted += [(((0, full // 2),), (long,) * 4)]
    held = [
        ((), (middle,) * 3),
        ((), (middle,) * 5),
        ((), (middle,) * 12),
        ((), (short,) * 24),
        (((0, 3 * full // 8),), (middle,) * 6),
        (((0, 3 * full // 4),), (short,) * 10),
        (((0, 5 * full // 8),), ()),
    ]
    few_fitted: list[_Batch] = [((), (short,) * size) for size in _spread_over(sizes, _FEW_SIZES)]
    few_fitted += [((), (long,) * 4), (((0, full // 4),), ()), (((0, full),), ()), (((0, full // 4),) * 4, ())]
    few_fitted += [(((0, full // 2),), (middle,) * (full // 8))]
    few_held: list[_Batch] = [((), (middle,) * 5), (((0, 3 * full // 8),), (middle,) * 6)]
    points = []
    for num_layers in layer_counts:
        is_most = num_layers == max(layer_counts)
        chosen = ((False, fitted), (True, held)) if is_most else ((False, few_fitted), (True, few_held))
        for held_out, batches in chosen:
            points += [
                GridPoint(part="layers", num_layers=num_layers, prefills=p, decodes=d, held_out=held_out)
                for p, d in batches
            ]
    for part in ("embedding", "head"):
        points += [GridPoint(part=part, num_layers=0, decodes=(0,) * size) for size in _up_to(full, (1, 8, 64))]
    usable = [
        point
        for point in points
        if point.kv_tokens <= max_kv_tokens
        and 0 < point.num_tokens <= full
        and all(past >= 0 and new > 0 for past, new in point.prefills)
    ]
    return tuple(dict.fromkeys(usable))


def peak_points(
    *,
    num_layers: int,
    max_batch_tokens: int,
    max_context_tokens: int,
    max_kv_tokens: int,
    gather_up_to_tokens: int,
) -> tuple[GridPoint, ...]:
    """Batches that need the most memory beside weights and KV cache, each for another reason.

    The most tokens; the largest mask, of a chunk after a past; the most cached tokens copied together, filled up with a
    chunk.

    Args:
        num_layers: how many the batches run.
        max_batch_tokens: largest batch.
        max_context_tokens: longest context.
        max_kv_tokens: slots of the KV cache, which no batch exceeds.
        gather_up_to_tokens: see ``attention.RaggedBatch``.
    """
    full, longest = min(max_batch_tokens, max_kv_tokens), min(max_context_tokens, max_kv_tokens)
    chunk = max(1, min(full, longest - 1))
    batches: list[_Batch] = [(((0, full),), ()), (((longest - chunk, chunk),), ())]
    if context := min(longest, gather_up_to_tokens):
        # As many as one call copies, and of one length, so that no slot is padding.
        count = min(full, max(MAX_GATHERED_SLOTS, context) // context, max_kv_tokens // context)
        rest = min(full - count, max_kv_tokens - count * context)
        batches.append((((0, rest),) if rest > 0 else (), (context - 1,) * count))
    return tuple(GridPoint(part="layers", num_layers=num_layers, prefills=p, decodes=d) for p, d in batches)


def _spread_over(values: list[int], count: int) -> list[int]:
    """At most ``count`` of the ascending values, evenly spread, the first and the last among them."""
    steps = min(count, len(values)) - 1
    return [values[round(step * (len(values) - 1) / max(1, steps))] for step in range(steps + 1)]


def _up_to(limit: int, values: tuple[int, ...]) -> list[int]:
    return sorted({min(value, limit) for value in values})


def layer_counts_to_measure(max_layers: int) -> tuple[int, ...]:
    """Half of the held layers and all of them: the two tell the fixed part of an iteration from the part per layer.

    A single layer would find its weights in the processor's cache, as no served stage does.
    """
    return tuple(sorted({(max_layers + 1) // 2, max_layers}))
