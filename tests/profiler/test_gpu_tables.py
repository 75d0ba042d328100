"""Published timing tables of four GPUs: fitted on every second row, held against the others."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from profiler.cluster_profile import MeasuredCost
from profiler.fit import relative_errors
from profiler.import_tables import import_cost

from ..solver.clusters import data_folder

DEVICES = ("a100", "l4", "t4", "v100")


@functools.cache
def cost_of(device: str) -> MeasuredCost:
    return import_cost(data_folder() / "gpu_profiles", device, max_batch_tokens=1 << 14, held_out_every=2)


@pytest.mark.parametrize("phase", ["prompt", "decode"])
@pytest.mark.parametrize("device", DEVICES)
def test_half_of_a_table_tells_the_other_half(device: str, phase: str) -> None:
    cost = cost_of(device)

    is_prompt = phase == "prompt"
    rows = [s for s in cost.samples if (s.batch.prefill_tokens > 0) == is_prompt]
    held_out = [s for s in rows if s.held_out]
    assert abs(len(held_out) - len(rows) / 2) <= 0.5
    errors = relative_errors(cost.stage, held_out)
    assert np.median(errors) <= 0.05
    assert np.percentile(errors, 90) <= 0.10


def test_a_bump_costs_its_own_rows_and_no_others(tmp_path: Path) -> None:
    """A kernel that is half as slow again from 65 to 85 tokens: no time that never falls meets it and what follows."""
    for phase, constant in (("prompt", 6.0), ("decode", 4.5)):
        rows = [(tokens, constant + 0.002 * tokens) for tokens in range(1, 200, 3)]
        bumped = [(t, ms * 1.5 if phase == "decode" and 65 <= t <= 85 else ms) for t, ms in rows]
        (tmp_path / f"toy_x_{phase}.csv").write_text("\n".join(f"{t},{ms:.3f}" for t, ms in bumped))

    cost = import_cost(tmp_path, "x", held_out_every=2)

    errors = relative_errors(cost.stage, cost.samples)
    inside = np.array([s.batch.decode_tokens >= 65 and s.batch.decode_tokens <= 85 for s in cost.samples])
    assert errors[~inside].max() < 0.02
    assert errors[inside].min() > 0.2
