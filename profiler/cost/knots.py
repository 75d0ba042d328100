"""Where the slope of the token term may change: powers of two, and the edges of the tiles that kernels work in."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

TILE_TOKENS = 64
"""Kernels on GPUs pad a batch to a whole tile: powers of two up to this, multiples of it beyond."""

MAX_GAP_IN_TILES = 0.75
"""Samples further apart than this part of a tile do not say at which edge between them the time rises."""


def power_of_two_knots(max_batch_tokens: float) -> tuple[float, ...]:
    """1, 2, 4 ... below the largest batch."""
    knots = [1.0]
    while knots[-1] * 2 < max_batch_tokens:
        knots.append(knots[-1] * 2)
    return tuple(knots)


def tile_knots(measured_tokens: Iterable[float]) -> tuple[float, ...]:
    """Knots at both sides of every tile edge that the samples resolve.

    An edge ``m`` is where a batch of ``m`` tokens fits its tiles and one of ``m + 1`` needs another. It is resolved
    where it is the only edge between two neighbouring samples that lie close together; elsewhere the line between
    them stays as it is.

    Args:
        measured_tokens: tokens of the batches that the fit sees.
    """
    tokens = sorted(set(measured_tokens))
    if not tokens:
        return ()
    edges = [2.0**power for power in range(TILE_TOKENS.bit_length()) if 2**power <= TILE_TOKENS]
    edges += [float(edge) for edge in range(2 * TILE_TOKENS, int(tokens[-1]) + 1, TILE_TOKENS)]
    knots: list[float] = []
    for low, high in pairwise(tokens):
        between = [edge for edge in edges if low <= edge < high]
        if len(between) == 1 and high - low <= MAX_GAP_IN_TILES * min(between[0], TILE_TOKENS):
            knots += [between[0], between[0] + 1]
    return tuple(sorted(set(knots)))
