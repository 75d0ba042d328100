"""With how many rows a batch runs: kernels favour some numbers, so a batch may be quicker with rows of padding. Pure.

Matrix products of 12 rows can take longer than of 16, and of 4 half as long again as of 3; which ones depends on the
processor and its library. So a node's sizes are measured (``row_timing``), a batch runs with the least size that is no
smaller, and time never falls when a batch grows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise

RowSizes = tuple[int, ...]
"""Ascending numbers of rows that layers run with, the first one 1; empty where a batch runs with its own number."""

SMALL_ROWS = 16
"""Up to so many rows each number is tried, and each size is measured; beyond, a few rows more or less matter little."""
_MOST_ROWS = 1 << 16
_WORTH = 0.97
"""A size is kept where it takes no more than this part of what every larger one does: less would be noise."""


def require_row_sizes(sizes: RowSizes) -> None:
    """Check that these are sizes, whoever sent them.

    Raises:
        ValueError: they are not.
    """
    if sizes and (sizes[0] != 1 or sizes[-1] > _MOST_ROWS or any(high <= low for low, high in pairwise(sizes))):
        raise ValueError(f"row_sizes: need ascending values from 1 to {_MOST_ROWS} at most")


def rows_of(tokens: int, sizes: RowSizes) -> int:
    """Rows that a layer runs with for so many tokens; as many as there are beyond the largest size."""
    at = bisect_left(sizes, tokens)
    return tokens if tokens < 1 or at == len(sizes) else sizes[at]


def rows_of_all(tokens: int, sizes: Sequence[RowSizes]) -> int:
    """The least number that is no smaller, and that each of several nodes runs without padding."""
    while (rows := max((rows_of(tokens, each) for each in sizes), default=tokens)) > tokens:
        tokens = rows
    return tokens


def candidates(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows worth timing: all small ones, then coarser, and the largest batch."""
    coarse = [*range(SMALL_ROWS + 4, 65, 4), *range(72, 129, 8), *range(160, max_rows + 1, 32)]
    return tuple(sorted({rows for rows in (*range(1, SMALL_ROWS + 1), *coarse) if rows < max_rows} | {max_rows}))


def choose_row_sizes(times_s: Mapping[int, float]) -> RowSizes:
    """The sizes that a batch should run with, given how long a layer's products take: each quicker than all larger.

    One token runs alone however long it takes: there is a decoding sequence in every batch of one.
    """
    kept: list[int] = []
    least_s = float("inf")
    for rows in sorted(times_s, reverse=True):
        if rows == 1 or not kept or times_s[rows] <= _WORTH * least_s:
            kept.append(rows)
        least_s = min(least_s, times_s[rows])
    return tuple(reversed(kept))
