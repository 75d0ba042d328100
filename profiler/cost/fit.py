"""Fit the stage-time model to measured samples: non-negative coefficients, relative errors, some samples kept out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from helixbench.errors import MeasurementError
from helixbench.profiler.cluster import CostSample, MeasuredCost
from helixbench.profiler.cost.knots import power_of_two_knots, tile_knots
from helixbench.profiler.cost.model import FloatArray, StageCost, feature_row
from helixbench.profiler.cost.nnls import biweight, least_squares

_FIRST_SEGMENT = 4  # index of the first token segment among the features


def fit_cost(
    samples: Sequence[CostSample],
    *,
    workspace_bytes: float,
    max_batch_tokens: int,
    source: str,
    gather_up_to_tokens: float = 0.0,
    has_tiles: bool = False,
    lets_few_go: bool = False,
) -> MeasuredCost:
    """The cost model that misses the samples least, relative to their size, and how far it misses the held-out ones.

    Below the smallest batch in the fit the time is that batch's.

    Args:
        samples: what was measured.
        workspace_bytes: stored with the cost, as are ``max_batch_tokens`` and ``source``.
        max_batch_tokens: most tokens of one iteration.
        source: what was timed.
        gather_up_to_tokens: see ``StageCost``.
        has_tiles: the device works in tiles of tokens, so the time may jump at an edge that the samples resolve.
        lets_few_go: few samples may be missed by far rather than all of a neighbourhood by a little.

    Raises:
        MeasurementError: no samples to fit, or none held out.
    """
    fitted = [sample for sample in samples if not sample.held_out]
    held_out = [sample for sample in samples if sample.held_out]
    if not fitted or not held_out:
        raise MeasurementError(f"{len(fitted)} samples to fit and {len(held_out)} to check it: need some of each")
    tokens = [sample.batch.tokens for sample in fitted if sample.num_layers > 0] or [1.0]
    edges = set(tile_knots(tokens)) if has_tiles else set()
    edges |= {sample.batch.tokens for sample in fitted if sample.is_refined}
    knots = tuple(sorted({*power_of_two_knots(max_batch_tokens), *edges}))
    rows = np.array([_row(sample, knots, gather_up_to_tokens) for sample in fitted])  # [samples, features]
    rows[:, [_FIRST_SEGMENT + k for k, end in enumerate(knots[1:]) if end <= min(tokens)]] = 0.0
    times = np.array([sample.median_s for sample in fitted])
    coefficients = (biweight if lets_few_go else least_squares)(rows, times)
    stage = _stage_cost(coefficients, knots, gather_up_to_tokens, fitted, max_batch_tokens)
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
    rows = [_row(sample, stage.token_knots, stage.gather_up_to_tokens) for sample in samples]
    predicted = np.array(rows) @ stage.coefficients()
    measured = np.array([sample.median_s for sample in samples])
    return np.asarray(np.abs(predicted - measured) / measured)


def _row(sample: CostSample, knots: tuple[float, ...], gather_up_to_tokens: float) -> FloatArray:
    return feature_row(
        num_layers=sample.num_layers,
        batch=sample.batch,
        first=sample.first,
        last=sample.last,
        token_knots=knots,
        gather_up_to_tokens=gather_up_to_tokens,
    )


def _stage_cost(
    coefficients: FloatArray,
    knots: tuple[float, ...],
    gather_up_to_tokens: float,
    fitted: Sequence[CostSample],
    max_batch_tokens: int,
) -> StageCost:
    values = [float(value) for value in coefficients]
    segments = len(knots)
    step_s, step_item_s, step_token_s, layer_s = values[:_FIRST_SEGMENT]
    decode_item, decode_context, prefill_chunk, prefill_pair, embed, embed_token, head, head_item, gather = values[
        _FIRST_SEGMENT + segments :
    ]
    contexts = [s.batch.decode_context_tokens / s.batch.decode_tokens for s in fitted if s.batch.decode_tokens]
    return StageCost(
        step_s=step_s,
        step_item_s=step_item_s,
        step_token_s=step_token_s,
        layer_s=layer_s,
        token_knots=knots,
        layer_token_s=tuple(values[_FIRST_SEGMENT : _FIRST_SEGMENT + segments]),
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
        layer_gather_context_s=gather,
        gather_up_to_tokens=gather_up_to_tokens,
        variation=float(np.median([s.variation for s in fitted if s.num_layers > 0] or [0.0])),
    )
