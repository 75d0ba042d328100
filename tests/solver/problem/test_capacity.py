"""The best capacity of a stage over all batches, against trying them."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from helixbench.profiler.cost.measured import MeasuredCost
from helixbench.solver.problem.capacity import batch_shape, best_rate, request_mix
from helixbench.solver.problem.workload import fixed_workload
from tests.solver.clusters import cost_node

MIX = request_mix(fixed_workload(prompt_tokens=10, output_tokens=10))


def cost_with(*more: float) -> MeasuredCost:
    """With knots at the first rows, after which a row costs so much more."""
    cost = cost_node("n").cost
    assert cost is not None
    knots = tuple(float(row) for row in range(1, len(more) + 2))
    stage = msgspec.structs.replace(cost.stage, token_knots=knots, layer_token_s=(*more, cost.stage.layer_token_s[-1]))
    return msgspec.structs.replace(cost, stage=stage)


def rate(cost: MeasuredCost, sequences: float) -> float:
    shape = batch_shape(MIX, sequences, max_batch_tokens=cost.max_batch_tokens)
    return sequences * MIX.tokens_per_output / cost.stage.time_s(num_layers=4, batch=shape, first=True, last=True)


@pytest.mark.parametrize("most", [0.8, 2.0, 3.1, 4.0, 40.0])
@pytest.mark.parametrize("more", [(), (0.0, 9e-4, 0.0, 0.0, 8e-4, 0.0), (2e-3, 2e-3, 0.0, 3e-3, 3e-3, 3e-3)])
def test_no_batch_carries_more_than_the_best_rate_says(most: float, more: tuple[float, ...]) -> None:
    cost = cost_with(*more)

    best = best_rate(cost, MIX, 4, first=True, last=True, max_sequences=most)

    assert best.sequences is not None
    assert best.sequences <= most
    assert best.tokens_per_s == pytest.approx(rate(cost, best.sequences))
    assert max(rate(cost, sequences) for sequences in np.linspace(0.05, most, 400)) <= best.tokens_per_s * (1 + 1e-9)
