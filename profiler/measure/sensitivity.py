"""Measure how iterations suffer when the processor slows down, from the blocks of one profile. Pure.

A profile times every batch several times, at whatever speed the machine happens to have. Against the mean of its batch
each block is a little slower or faster, and so were the two reference works meanwhile: a regression of the one on the
other gives the powers. Nothing that is served later has a part in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from scipy.optimize import nnls

from helixbench.profiler.cost.model import FloatArray
from helixbench.profiler.measure.pace import MOST_POWER, USUAL, PacedWork, Sensitivity, seconds_at_pace
from helixbench.profiler.measure.sampler import Block

_TRUST = 0.15
"""Standard deviation of a power around the usual one: where a machine's speed hardly changes, they stay the usual."""
_LEAST_NOISE = 0.01  # relative deviation of a block that no correction takes out
_FAR = 4.0  # deviations: a block that misses by more is left out
_TURNS = 3  # of leaving out and fitting
_RANGE_OF_SD = {2: 1.13, 3: 1.69, 4: 2.06, 5: 2.33}
"""How far apart the least and the largest of so many normal values are in the mean, in deviations."""


def measure_sensitivity(blocks: Sequence[Block]) -> Sensitivity:
    """The powers that make blocks of one batch agree best: ridge regression towards the usual ones, none below 0."""
    usual = np.array([getattr(USUAL, name) for name in USUAL.__struct_fields__])
    batches = _batches(blocks)
    powers = usual
    for _ in range(_TURNS):
        noise = _noise(batches, powers)
        kept = [rows for batch in batches if len(rows := batch[_misses(batch, powers) < _FAR * noise]) > 1]
        if not kept:
            return USUAL
        within = np.concatenate([rows - rows.mean(axis=0) for rows in kept])
        powers = _ridge(within[:, 1:], within[:, 0], towards=usual, weight=noise / _TRUST)
    found = np.minimum(powers, MOST_POWER).tolist()
    return Sensitivity(**dict(zip(USUAL.__struct_fields__, found, strict=True)))


def at_sensitivity(blocks: Sequence[Block], sensitivity: Sensitivity, *, before: Sensitivity) -> tuple[Block, ...]:
    """The blocks as they would have come out had iterations been held back by these powers from the beginning."""
    return tuple(_rescaled(block, sensitivity, before=before) for block in blocks)


def _rescaled(block: Block, sensitivity: Sensitivity, *, before: Sensitivity) -> Block:
    if block.work is None or not block.work.cpu_s:
        return block
    factor = seconds_at_pace(block.work, sensitivity) / seconds_at_pace(block.work, before)
    return msgspec.structs.replace(block, mean_s=block.mean_s * factor, deviation_s=block.deviation_s * factor)


def _batches(blocks: Sequence[Block]) -> list[FloatArray]:
    """For each batch that was measured again: logarithm of CPU seconds, then features, [blocks, 1 + powers]."""
    of_batch: dict[object, list[tuple[float, ...]]] = {}
    for block in blocks:
        if block.work is not None and block.work.cpu_s > 0:
            row = (math.log(block.work.cpu_s), *_features(block.work))
            of_batch.setdefault(block.point, []).append(row)
    return [np.array(rows) for rows in of_batch.values() if len(rows) > 1]


def _misses(batch: FloatArray, powers: FloatArray) -> FloatArray:
    """How far each block lies from the middle one of its batch, once it is corrected by these powers."""
    corrected = batch[:, 0] - batch[:, 1:] @ powers
    return np.asarray(np.abs(corrected - np.median(corrected)))


def _noise(batches: Sequence[FloatArray], powers: FloatArray) -> float:
    """Standard deviation of blocks once they are corrected, which a few far ones do not change."""
    ranges = [
        float(np.ptp(batch[:, 0] - batch[:, 1:] @ powers)) / _RANGE_OF_SD[min(len(batch), 5)] for batch in batches
    ]
    return max(_LEAST_NOISE, float(np.median(ranges))) if ranges else _LEAST_NOISE


def _features(work: PacedWork) -> tuple[float, float, float, float]:
    """What each power multiplies in the logarithm of the CPU seconds, in the order of ``Sensitivity``."""
    weights, matmul = math.log(work.weights), math.log(work.matmul)
    other = 1 - work.arithmetic
    return work.arithmetic * weights, work.arithmetic * matmul, other * weights, other * matmul


def _ridge(rows: FloatArray, logs: FloatArray, *, towards: FloatArray, weight: float) -> FloatArray:
    pull = weight * np.eye(len(towards))
    return np.asarray(nnls(np.vstack([rows, pull]), np.concatenate([logs, pull @ towards]))[0])
