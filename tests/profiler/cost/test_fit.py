from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixbench.errors import MeasurementError
from helixbench.profiler.cost.fit import fit_cost, relative_errors
from helixbench.profiler.cost.measured import CostSample
from helixbench.profiler.cost.model import BatchShape, StageCost
from helixbench.profiler.measure.grid import GridPoint, grid

MAX_BATCH_TOKENS = 128
KNOTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
POINTS = grid(layer_counts=(7, 14), max_batch_tokens=MAX_BATCH_TOKENS, max_context_tokens=512, max_kv_tokens=20_000)
TOLERANCE = 0.02


def true_cost(**changes: float) -> StageCost:
    """A node like the ones that were measured: 2 ms a step, 1 ms a layer, and attention that grows with the context."""
    fields = {
        "step_s": 2e-3,
        "step_item_s": 4e-5,
        "step_token_s": 1e-5,
        "layer_s": 1e-3,
        "layer_decode_item_s": 2e-5,
        "layer_decode_context_s": 5e-8,
        "layer_prefill_chunk_s": 3e-5,
        "layer_prefill_pair_s": 2e-8,
        "embed_s": 1e-4,
        "embed_token_s": 1e-6,
        "head_s": 5e-4,
        "head_item_s": 2e-5,
    }
    return StageCost(
        **(fields | changes),
        token_knots=KNOTS,
        layer_token_s=(4e-4, 3e-4, 1e-4, 1e-4, 2e-4, 2e-4, 1.5e-4),
        max_tokens=MAX_BATCH_TOKENS,
        max_context_tokens=513.0,
    )


def sample_of(point: GridPoint, cost: StageCost, *, factor: float = 1.0) -> CostSample:
    first, last = point.part == "embedding", point.part == "head"
    time_s = cost.time_s(num_layers=point.num_layers, batch=point.shape, first=first, last=last)
    return CostSample(
        num_layers=point.num_layers,
        first=first,
        last=last,
        batch=point.shape,
        median_s=time_s * factor,
        spread=0.01,
        repeats=3,
        held_out=point.held_out,
    )


def fitted(cost: StageCost, *, noise: float = 0.0, seed: int = 0) -> StageCost:
    draw = random.Random(seed)
    samples = [sample_of(point, cost, factor=draw.gauss(1, noise)) for point in POINTS]
    made = fit_cost(samples, workspace_bytes=1e6, max_batch_tokens=MAX_BATCH_TOKENS, source="made up")
    return made.stage


def served_batches() -> list[tuple[int, bool, bool, BatchShape]]:
    """Stages and batches that a server runs, none of them in the grid."""
    batches = [
        BatchShape(decode_tokens=n, decode_context_tokens=n * context, sampled_tokens=n)
        for n in (1, 5, 20, 50, 100)
        for context in (30, 100, 300)
    ]
    batches += [
        BatchShape(
            prefill_tokens=n,
            prefill_chunks=1,
            prefill_pairs=n * (n + 1) / 2,
            decode_tokens=20,
            decode_context_tokens=20 * 150,
            sampled_tokens=20,
        )
        for n in (10, 40, 90)
    ]
    return [(layers, first, last, b) for layers in (3, 10, 16) for first in (0, 1) for last in (0, 1) for b in batches]  # type: ignore[misc]


@settings(max_examples=10, deadline=None)
@given(
    step=st.floats(1e-4, 1e-2),
    layer=st.floats(1e-4, 1e-2),
    context=st.floats(0, 1e-6),
    pairs=st.floats(0, 1e-6),
    head=st.floats(1e-5, 1e-2),
)
def test_exact_samples_give_the_times_back(
    step: float, layer: float, context: float, pairs: float, head: float
) -> None:
    cost = true_cost(
        step_s=step, layer_s=layer, layer_decode_context_s=context, layer_prefill_pair_s=pairs, head_s=head
    )
    found = fitted(cost)

    for layers, first, last, batch in served_batches():
        true_s = cost.time_s(num_layers=layers, batch=batch, first=bool(first), last=bool(last))
        found_s = found.time_s(num_layers=layers, batch=batch, first=bool(first), last=bool(last))
        assert found_s == pytest.approx(true_s, rel=TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
def test_noise_of_three_percent_costs_no_more_than_that(seed: int) -> None:
    cost = true_cost()
    found = fitted(cost, noise=0.03, seed=seed)

    errors = [
        abs(
            found.time_s(num_layers=layers, batch=batch, first=bool(first), last=bool(last))
            / cost.time_s(num_layers=layers, batch=batch, first=bool(first), last=bool(last))
            - 1
        )
        for layers, first, last, batch in served_batches()
        if layers > 3  # below half of the fewest layers measured, noise in the step's part shows
    ]
    assert sorted(errors)[len(errors) // 2] < 0.03
    assert max(errors) < 0.09


def test_held_out_error_is_that_of_samples_the_fit_has_not_seen() -> None:
    samples = [sample_of(point, true_cost(), factor=1.25 if point.held_out else 1.0) for point in POINTS]

    made = fit_cost(samples, workspace_bytes=1e6, max_batch_tokens=MAX_BATCH_TOKENS, source="made up")

    assert made.held_out_error_median == pytest.approx(0.2, abs=TOLERANCE)
    assert made.held_out_error_p90 == pytest.approx(0.2, abs=TOLERANCE)
    fitted_errors = relative_errors(made.stage, [sample for sample in samples if not sample.held_out])
    assert fitted_errors.max() < TOLERANCE
    exact = fit_cost(
        [sample_of(point, true_cost()) for point in POINTS],
        workspace_bytes=1e6,
        max_batch_tokens=MAX_BATCH_TOKENS,
        source="",
    )
    assert exact.held_out_error_p90 < TOLERANCE


def test_what_was_measured_stands_beside_the_fit() -> None:
    samples = [sample_of(point, true_cost()) for point in POINTS]

    made = fit_cost(samples, workspace_bytes=123.0, max_batch_tokens=MAX_BATCH_TOKENS, source="here")

    assert made.samples == tuple(samples)
    assert (made.workspace_bytes, made.max_batch_tokens, made.source) == (123.0, MAX_BATCH_TOKENS, "here")
    assert made.stage.token_knots == KNOTS
    assert made.stage.max_tokens == MAX_BATCH_TOKENS
    assert made.stage.max_context_tokens == 513, "the longest context that a decoding sequence had"


@given(factors=st.lists(st.floats(0.2, 5), min_size=len(POINTS), max_size=len(POINTS)))
@settings(max_examples=20, deadline=None)
def test_whatever_is_measured_coefficients_are_not_negative(factors: list[float]) -> None:
    samples = [sample_of(point, true_cost(), factor=factor) for point, factor in zip(POINTS, factors, strict=True)]
    made = fit_cost(samples, workspace_bytes=0.0, max_batch_tokens=MAX_BATCH_TOKENS, source="")
    assert made.stage.coefficients().min() >= 0


@pytest.mark.parametrize("is_held_out", [True, False])
def test_samples_of_one_kind_alone_give_no_cost(is_held_out: bool) -> None:
    samples = [msgspec.structs.replace(sample_of(point, true_cost()), held_out=is_held_out) for point in POINTS[:5]]
    with pytest.raises(MeasurementError, match=r"samples to fit and . to check it: need some of each"):
        fit_cost(samples, workspace_bytes=0.0, max_batch_tokens=MAX_BATCH_TOKENS, source="")


def test_fewer_tokens_than_were_measured_take_as_long_as_the_fewest() -> None:
    samples = [sample_of(point, true_cost()) for point in POINTS if point.num_layers == 0 or point.num_tokens >= 4]

    made = fit_cost(samples, workspace_bytes=0.0, max_batch_tokens=MAX_BATCH_TOKENS, source="").stage

    assert len({made.scope_s("layer", BatchShape(prefill_tokens=tokens)) for tokens in (1, 2, 4)}) == 1


def test_the_price_of_gathering_and_the_variation_are_found() -> None:
    true = true_cost(layer_gather_context_s=4e-7, gather_up_to_tokens=192.0)
    samples = [
        msgspec.structs.replace(sample_of(point, true), variation=0.1 + 0.1 * (number % 3))
        for number, point in enumerate(POINTS)
    ]

    def fit(up_to: float) -> StageCost:
        made = fit_cost(
            samples,
            workspace_bytes=0.0,
            max_batch_tokens=MAX_BATCH_TOKENS,
            source="",
            gather_up_to_tokens=up_to,
        )
        return made.stage

    batch = BatchShape(decode_tokens=8, decode_context_tokens=8 * 100, sampled_tokens=8)
    wanted_s = true.time_s(num_layers=10, batch=batch, first=False, last=False)
    assert fit(192.0).time_s(num_layers=10, batch=batch, first=False, last=False) == pytest.approx(wanted_s, rel=0.01)
    assert fit(192.0).layer_gather_context_s == pytest.approx(4e-7, rel=0.2)
    assert fit(192.0).variation == pytest.approx(0.2)
    assert fit(0.0).layer_gather_context_s == 0
