"""Non-negative regressions on relative errors: least squares for noise, a redescending one for kernels that switch."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog, nnls

from helixbench.errors import MeasurementError
from helixbench.profiler.cost.model import FloatArray

# Tukey's biweight at 95 % efficiency for normal errors, and the factor that makes a median of |errors| a deviation.
# Source: Maronna, Martin, Yohai, Robust Statistics, sections 2.2 and 2.4.
BIWEIGHT = 4.685
NORMAL_MAD = 1.4826
SMALLEST_DEVIATION = 0.02
"""Relative deviation below which errors are taken for rounding: tables give whole milliseconds."""
ITERATIONS = 30


def least_squares(rows: FloatArray, times: FloatArray) -> FloatArray:
    """Coefficients >= 0 with the least squared relative errors: right where every sample has some noise.

    Args:
        rows: features of each sample, shape [samples, features].
        times: seconds, shape [samples].
    """
    scaled, scale = _scaled(rows, times)
    return np.asarray(nnls(scaled, np.ones(len(times)))[0] / scale)


def biweight(rows: FloatArray, times: FloatArray) -> FloatArray:
    """Coefficients >= 0 that follow most samples closely and let a few go, where no non-decreasing curve meets all.

    Some kernels are slower for a range of batches than for larger ones. A time that never falls cannot follow that, and
    least squares would miss the whole neighbourhood by a little. From the least absolute errors (a linear programme)
    weighted least squares go on, a sample's weight falling to 0 with its error.

    Raises:
        MeasurementError: the linear programme has no answer.
    """
    scaled, scale = _scaled(rows, times)
    coefficients = _least_absolute(scaled)
    for _ in range(ITERATIONS):
        errors = np.abs(scaled @ coefficients - 1)
        cutoff = BIWEIGHT * max(NORMAL_MAD * float(np.median(errors)), SMALLEST_DEVIATION)
        weights = np.where(errors < cutoff, 1 - (errors / cutoff) ** 2, 0.0)
        coefficients = nnls(scaled * weights[:, None], weights)[0]
    return np.asarray(coefficients / scale)


def _least_absolute(scaled: FloatArray) -> FloatArray:
    samples, features = scaled.shape
    found = linprog(
        np.concatenate([np.zeros(features), np.ones(2 * samples)]),  # coefficients, errors above, errors below
        A_eq=np.hstack([scaled, np.eye(samples), -np.eye(samples)]),
        b_eq=np.ones(samples),
        bounds=(0, None),
        method="highs",
    )
    if found.x is None:
        raise MeasurementError(f"no cost fits these samples ({found.message})")
    return np.asarray(found.x[:features])


def _scaled(rows: FloatArray, times: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Rows that give 1 where a time is met, each feature between -1 and 1, and what features were divided by."""
    relative = rows / times[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-30)
    return np.asarray(relative / scale), np.asarray(scale)
