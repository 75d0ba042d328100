"""Fit the stage-time model to measured samples: non-negative least squares on relative errors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from .cluster_profile import CostSample, MeasuredCost
from .cost import FloatArray, StageCost, feature_row
from .errors import MeasurementError


def fit_cost(
    samples: Sequence[CostSample], *, workspace_bytes: float, max_batch_tokens: int, source: str
) -> MeasuredCost:
    """The cost model that misses the samples least, relative to their size, and how far it misses the held-out ones.

    Raises:
        MeasurementError: no samples to fit, or none held out.
    """
    fitted = [sample for sample in samples if not sample.held_out]
    held_out = [sample for sample in samples if sample.held_out]
    if not fitted or not held_out:
        raise MeasurementError(f"{len(fitted)} samples to fit and {len(held_out)} to check it: need some of each")
    knots = _token_knots(max_batch_tokens)
    rows = np.array([_row(sample, knots) for sample in fitted])  # [samples, features]
    times = np.array([sample.median_s for sample in fitted])
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-30)
    coefficients = nnls(rows / scale / times[:, None], np.ones(len(fitted)))[0] / scale
    stage = _stage_cost(coefficients, knots, fitted, max_batch_tokens)
    errors = relative_errors(stage, held_out)
    return MeasuredCost(
        stage=stage,
        samples=tuple(samples),
        held_out_error_median=float(np.median(errors)),
        held_out_error_p90=float(np.percentile(errors, 90)),
        workspace_bytes=workspace_bytes,
        max_batch_tokens=max_batch_tokens,
        source=source,
    )


def relative_errors(stage: StageCost, samples: Sequence[CostSample]) -> FloatArray:
    """|predicted - measured| / measured of each sample, shape [samples]."""
    predicted = np.array([_row(sample, stage.token_knots) @ stage.coefficients() for sample in samples])
    measured = np.array([sample.median_s for sample in samples])
    return np.asarray(np.abs(predicted - measured) / measured)


def _token_knots(max_batch_tokens: int) -> tuple[float, ...]:
    knots = [1.0]
    while knots[-1] * 2 < max_batch_tokens:
        knots.append(knots[-1] * 2)
    return tuple(knots)


def _row(sample: CostSample, knots: tuple[float, ...]) -> FloatArray:
    return feature_row(
        num_layers=sample.num_layers, batch=sample.batch, first=sample.first, last=sample.last, token_knots=knots
    )


def _stage_cost(
    coefficients: FloatArray, knots: tuple[float, ...], fitted: Sequence[CostSample], max_batch_tokens: int
) -> StageCost:
    values = [float(value) for value in coefficients]
    segments = len(knots)
    step_s, step_item_s, step_token_s, layer_s = values[:4]
    decode_item, decode_context, prefill_chunk, prefill_pair, embed, embed_token, head, head_item = values[
        4 + segments :
    ]
    contexts = [s.batch.decode_context_tokens / s.batch.decode_tokens for s in fitted if s.batch.decode_tokens]
    return StageCost(
        step_s=step_s,
        step_item_s=step_item_s,
        step_token_s=step_token_s,
        layer_s=layer_s,
        token_knots=knots,
        layer_token_s=tuple(values[4 : 4 + segments]),
        layer_decode_item_s=decode_item,
        layer_decode_context_s=decode_context,
        layer_prefill_chunk_s=prefill_chunk,
        layer_prefill_pair_s=prefill_pair,
        embed_s=embed,
        embed_token_s=embed_token,
        head_s=head,
        head_item_s=head_item,
        max_tokens=float(max_batch_tokens),
        max_context_tokens=max(contexts, default=0.0),
    )
