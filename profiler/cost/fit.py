"""Fit the stage-time model to measured samples: non-negative coefficients, relative errors, some samples held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from helixbench.errors import MeasurementError
from helixbench.profiler.cost.knots import power_of_two_knots, tile_knots
from helixbench.profiler.cost.measured import CostSample, MeasuredCost
from helixbench.profiler.cost.model import Bends, FloatArray, StageCost, columns, feature_row
from helixbench.profiler.cost.nnls import biweight, least_squares


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
    """The cost model with the smallest relative errors, and its errors on the held-out samples.

    Below the smallest batch in the fit the time is that batch's.

    Args:
        samples: measured points, some of them held out.
        workspace_bytes: stored with the cost, as are ``max_batch_tokens`` and ``source``.
        max_batch_tokens: most tokens of one iteration.
        source: what was timed.
        gather_up_to_tokens: see ``StageCost``.
        has_tiles: the device works in tiles of tokens, so the time may jump at an edge that the samples resolve.
        lets_few_go: large errors on few samples rather than small ones on all of a neighbourhood.

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
    bends = Bends(knots, gather_up_to_tokens)
    rows = np.array([_row(sample, bends) for sample in fitted])  # [samples, features]
    first_segment = columns(bends)["layer_token_s"].start
    rows[:, [first_segment + k for k, end in enumerate(knots[1:]) if end <= min(tokens)]] = 0.0
    times = np.array([sample.median_s for sample in fitted])
    contexts = [s.batch.decode_context_tokens / s.batch.decode_tokens for s in fitted if s.batch.decode_tokens]
    stage = StageCost.of(
        (biweight if lets_few_go else least_squares)(rows, times),
        bends,
        max_tokens=float(max_batch_tokens),
        max_context_tokens=max(contexts, default=0.0),
        variation=float(np.median([s.variation for s in fitted if s.num_layers > 0] or [0.0])),
    )
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
    rows = [_row(sample, stage.bends) for sample in samples]
    predicted = np.array(rows) @ stage.coefficients()
    measured = np.array([sample.median_s for sample in samples])
    return np.asarray(np.abs(predicted - measured) / measured)


def _row(sample: CostSample, bends: Bends) -> FloatArray:
    return feature_row(
        num_layers=sample.num_layers, batch=sample.batch, first=sample.first, last=sample.last, bends=bends
    )
