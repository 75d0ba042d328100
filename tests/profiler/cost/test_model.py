from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixbench.profiler.cost.model import SCOPES, TERMS, BatchShape, Bends, StageCost, columns, feature_row

SECONDS = st.floats(0, 1e-2)


@st.composite
def stage_costs(draw: st.DrawFn) -> StageCost:
    knots = (1.0, *sorted(draw(st.sets(st.integers(2, 200).map(float), max_size=4))))
    plain = {
        field: draw(SECONDS)
        for field in StageCost.__struct_fields__
        if field
        not in (
            "token_knots",
            "layer_token_s",
            "max_tokens",
            "max_context_tokens",
        )
    }
    return StageCost(
        **plain,
        token_knots=knots,
        layer_token_s=tuple(draw(SECONDS) for _ in knots),
        max_tokens=256.0,
        max_context_tokens=512.0,
    )


def flat_cost(**changes: Any) -> StageCost:
    """All coefficients 0 but those given."""
    return StageCost.with_zeros(max_tokens=64.0, max_context_tokens=64.0, **changes)


BATCHES = st.builds(BatchShape, **dict.fromkeys(BatchShape.__struct_fields__, st.floats(0, 500)))


@given(cost=stage_costs(), batch=BATCHES, more=BATCHES, num_layers=st.integers(1, 80), first=..., last=...)
def test_time_never_falls_when_a_batch_grows(
    cost: StageCost, batch: BatchShape, more: BatchShape, num_layers: int, first: bool, last: bool
) -> None:
    larger = BatchShape(*(a + b for a, b in zip(*map(msgspec.structs.astuple, (batch, more)), strict=True)))

    def time_s(of: BatchShape, layers: int) -> float:
        return cost.time_s(num_layers=layers, batch=of, first=first, last=last)

    assert time_s(batch, num_layers) <= time_s(larger, num_layers) * (1 + 1e-9)
    assert time_s(batch, num_layers) >= 0
    assert time_s(batch, num_layers) <= time_s(batch, num_layers + 1) * (1 + 1e-9)


def plain_sum_s(cost: StageCost, batch: BatchShape, *, num_layers: float, first: bool, last: bool) -> float:
    """The formula of the module's docstring, term by term."""
    counts = msgspec.structs.astuple(batch)
    times = {"step": num_layers > 0, "layer": num_layers, "embedding": first, "head": last}
    return sum(
        times[term.scope] * value * quantity
        for term in TERMS
        for value, quantity in zip(cost.values_of(term), term.quantities(counts, cost.bends), strict=True)
    )


@given(cost=stage_costs(), batch=BATCHES, num_layers=st.integers(0, 80), first=..., last=...)
def test_all_forms_of_the_formula_agree(
    cost: StageCost, batch: BatchShape, num_layers: int, first: bool, last: bool
) -> None:
    seconds = cost.time_s(num_layers=num_layers, batch=batch, first=first, last=last)
    row = feature_row(num_layers=num_layers, batch=batch, first=first, last=last, bends=cost.bends)
    parts = {scope: cost.scope_s(scope, batch) for scope in SCOPES}  # what the printed table shows

    assert seconds == close_to(plain_sum_s(cost, batch, num_layers=num_layers, first=first, last=last))
    assert seconds == close_to(float(row @ cost.coefficients()))
    assert seconds == close_to(
        num_layers * parts["layer"]
        + (num_layers > 0) * parts["step"]
        + first * parts["embedding"]
        + last * parts["head"]
    )
    if num_layers > 0:
        entry = 0 if first else 3
        counts = {entry: msgspec.structs.astuple(batch)}
        assert seconds == close_to(cost.time_with_entries_s(counts, end=entry + num_layers, last=last))


@given(cost=stage_costs(), entering=st.dictionaries(st.integers(0, 9), BATCHES, min_size=1, max_size=4), last=...)
def test_late_entries_run_layer_by_layer_with_all_that_has_entered(
    cost: StageCost, entering: dict[int, BatchShape], last: bool
) -> None:
    entering, end = dict(sorted(entering.items())), 10
    expected_s, inside = 0.0, BatchShape()
    for layer in range(end):
        if layer in entering:
            counts = zip(*map(msgspec.structs.astuple, (inside, entering[layer])), strict=True)
            inside = BatchShape(*(sum(pair) for pair in counts))
        if layer >= min(entering):
            expected_s += cost.scope_s("layer", inside)
    expected_s += cost.scope_s("step", inside) + last * cost.scope_s("head", inside)
    if 0 in entering:
        expected_s += cost.scope_s("embedding", entering[0])

    counts_at = {layer: msgspec.structs.astuple(batch) for layer, batch in entering.items()}
    assert cost.time_with_entries_s(counts_at, end=end, last=last) == close_to(expected_s)


@given(cost=stage_costs())
def test_coefficients_come_back_from_their_vector(cost: StageCost) -> None:
    rest = {field: getattr(cost, field) for field in ("max_tokens", "max_context_tokens", "variation")}
    assert StageCost.of(cost.coefficients(), cost.bends, **rest) == cost


def test_every_coefficient_has_a_term() -> None:
    others = {"token_knots", "gather_up_to_tokens", "max_tokens", "max_context_tokens", "variation"}
    assert {term.coefficient for term in TERMS} == set(StageCost.__struct_fields__) - others


def close_to(seconds: float) -> Any:
    return pytest.approx(seconds, rel=1e-9, abs=1e-15)


@given(cost=stage_costs(), batch=BATCHES, first=..., last=...)
def test_time_is_linear_in_layers(cost: StageCost, batch: BatchShape, first: bool, last: bool) -> None:
    times = [cost.time_s(num_layers=n, batch=batch, first=first, last=last) for n in (1, 2, 3)]
    assert times[2] - times[1] == pytest.approx(times[1] - times[0], abs=1e-9 * (1 + times[2]))


@given(cost=stage_costs(), batch=BATCHES)
def test_ends_cost_what_they_cost_alone(cost: StageCost, batch: BatchShape) -> None:
    def time_s(*, num_layers: int, first: bool, last: bool) -> float:
        return cost.time_s(num_layers=num_layers, batch=batch, first=first, last=last)

    whole = time_s(num_layers=4, first=True, last=True)
    parts = (
        time_s(num_layers=4, first=False, last=False)
        + time_s(num_layers=0, first=True, last=False)
        + time_s(num_layers=0, first=False, last=True)
    )
    assert whole == pytest.approx(parts)


def test_each_coefficient_stands_for_its_own_quantity() -> None:
    batch = BatchShape(
        prefill_tokens=12,
        prefill_chunks=2,
        prefill_pairs=30,
        decode_tokens=3,
        decode_context_tokens=90,
        sampled_tokens=4,
    )
    expected = {
        "step_s": 1,
        "step_item_s": 5,
        "step_token_s": 15,
        "layer_s": 7,
        "layer_decode_item_s": 7 * 3,
        "layer_decode_context_s": 7 * 90,
        "layer_prefill_chunk_s": 7 * 2,
        "layer_prefill_pair_s": 7 * 30,
        "embed_s": 1,
        "embed_token_s": 15,
        "head_s": 1,
        "head_item_s": 4,
    }
    for field, quantity in expected.items():
        cost = flat_cost(**{field: 1.0})
        assert cost.time_s(num_layers=7, batch=batch, first=True, last=True) == quantity, field


@pytest.mark.parametrize(
    ("tokens", "layer_s"), [(1, 0), (3, 2), (4, 3), (10, 3 + 60), (16, 3 + 120), (20, 3 + 120 + 400)]
)
def test_tokens_cost_what_their_segment_says(tokens: int, layer_s: float) -> None:
    cost = flat_cost(token_knots=(1.0, 4.0, 16.0), layer_token_s=(1.0, 10.0, 100.0))
    assert cost.time_s(num_layers=1, batch=BatchShape(decode_tokens=tokens), first=False, last=False) == layer_s


@pytest.mark.parametrize(
    ("sequences", "context", "gathered"), [(1, 90, 0), (4, 90, 3 * 90), (4, 192, 3 * 192), (4, 800, 3 * 192), (0, 0, 0)]
)
def test_contexts_are_gathered_where_several_sequences_decode(sequences: int, context: int, gathered: int) -> None:
    """Up to a length, from which on each is attended by itself."""
    cost = flat_cost(layer_gather_context_s=1.0, gather_up_to_tokens=192.0)
    batch = BatchShape(decode_tokens=sequences, decode_context_tokens=sequences * context)
    assert cost.time_s(num_layers=2, batch=batch, first=False, last=False) == 2 * gathered


def test_embedding_alone_has_no_step_and_no_layers() -> None:
    bends = Bends(token_knots=(1.0, 4.0))
    row = feature_row(
        num_layers=0,
        batch=BatchShape(decode_tokens=8, sampled_tokens=8),
        first=True,
        last=False,
        bends=bends,
    )
    where = columns(bends)
    assert row[where["embed_s"]].tolist() == [1]
    assert row[where["embed_token_s"]].tolist() == [8]
    assert np.count_nonzero(row) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_knots": (2.0,)}, "first knot 1"),
        ({"token_knots": ()}, "need one length"),
        ({"token_knots": (1.0, 4.0)}, "need one length"),
        ({"token_knots": (1.0, 4.0, 4.0), "layer_token_s": (0.0, 0.0, 0.0)}, "need ascending values"),
        ({"step_s": -1e-9}, "finite values >= 0"),
        ({"layer_token_s": (-1.0,)}, "finite values >= 0"),
        ({"head_s": float("nan")}, "finite values >= 0"),
        ({"layer_s": float("inf")}, "finite values >= 0"),
    ],
)
def test_impossible_coefficients_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flat_cost(**changes)
