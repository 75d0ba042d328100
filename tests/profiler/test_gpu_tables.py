"""Published timing tables of four GPUs: fitted on every second row, held against the others."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile, Device, ModelFacts, Node
from helixbench.profiler.cost.fit import relative_errors
from helixbench.profiler.cost.measured import MeasuredCost
from helixbench.profiler.import_tables import import_cost, with_imported_costs
from tests.solver.clusters import DATA

DEVICES = ("a100", "l4", "t4", "v100")


@functools.cache
def cost_of(device: str) -> MeasuredCost:
    return import_cost(DATA / "gpu_profiles", device, max_batch_tokens=1 << 14, held_out_every=2)


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


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    for phase in ("prompt", "decode"):
        rows = [(tokens, 2 + 0.01 * tokens) for tokens in range(1, 100, 5)]
        (tmp_path / f"toy_x_{phase}.csv").write_text("\n".join(f"{tokens},{ms:.3f}" for tokens, ms in rows))
    return tmp_path


def one_node_cluster() -> ClusterProfile:
    return ClusterProfile(
        model=ModelFacts(
            name="toy",
            num_layers=4,
            activation_bytes_per_token=8.0,
            token_bytes=2.0,
            layer_weight_bytes=1e9,
            kv_bytes_per_token_per_layer=1000.0,
        ),
        nodes=(
            Node(
                name="one",
                device=Device(kind="cuda", name="X", memory_bytes=16e9),
                max_layers=4,
                capacity_tokens_per_s=(4.0, 3.0, 2.0, 1.0),
            ),
        ),
    )


def test_an_engine_leaves_less_for_kv_caches_than_memory_less_weights(tables: Path) -> None:
    node = with_imported_costs(one_node_cluster(), tables, memory_utilization=0.75, workspace_bytes=3e9).nodes[0]

    assert node.cost is not None
    assert node.device.memory_bytes == pytest.approx(12e9)
    assert node.cost.workspace_bytes == 3e9
    assert "workspace of 3 GB is an assumption" in node.cost.source


def test_importing_once_more_takes_nothing_off_again(tables: Path) -> None:
    once = with_imported_costs(one_node_cluster(), tables)
    assert once != one_node_cluster()
    assert with_imported_costs(once, tables) == once
    whole = with_imported_costs(once, tables, memory_utilization=1.0)
    assert whole.nodes[0].device.memory_bytes == 16e9


@pytest.mark.parametrize(
    ("utilization", "workspace_bytes", "option"),
    [(0.0, 0.0, "--memory-utilization"), (1.2, 0.0, "--memory-utilization"), (0.9, 15e9, "--workspace-bytes")],
)
def test_memory_that_leaves_nothing_is_refused(
    tables: Path, utilization: float, workspace_bytes: float, option: str
) -> None:
    with pytest.raises(InputError, match=option):
        with_imported_costs(one_node_cluster(), tables, memory_utilization=utilization, workspace_bytes=workspace_bytes)


def test_kv_caches_that_an_engine_had_are_met_within_a_sixth() -> None:
    """Published for LLaMA-2 70B by layers held, in blocks of 16 tokens; the cluster file's layers have 1.53e9 bytes."""
    published = {
        "a100": (40e9, {4: 104997, 7: 48807, 8: 39442, 12: 17591}),
        "l4": (24e9, {4: 46944, 6: 22592, 7: 15634}),
        "t4": (16e9, {2: 63484, 3: 32872, 4: 17566}),
    }
    for device, (memory_bytes, by_layers) in published.items():
        for layers, blocks in by_layers.items():
            left = 0.9 * memory_bytes - cost_of(device).workspace_bytes - layers * 1.53e9
            assert left / (layers * 4096) == pytest.approx(blocks * 16, rel=1 / 6), (device, layers)
