from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.device_files import DEVICES, device
from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile, ModelFacts
from helixbench.profiler.cost.model import BatchShape
from helixbench.profiler.emulated_device import (
    EmulatedDevice,
    Roofline,
    device_of_node,
    device_path,
    load_device,
)
from helixbench.records import load_record, save_record
from tests.solver.clusters import cost_node, table_node
from tests.solver.clusters import model as cluster_model

PUBLISHED = Path(__file__).parents[2] / "examples" / "data" / "clusters" / "published24-llama70b.json"
SMALL = ModelFacts(
    name="small",
    num_layers=4,
    activation_bytes_per_token=200.0,
    token_bytes=4.0,
    layer_weight_bytes=2e6,
    kv_bytes_per_token_per_layer=100.0,
    embedding_bytes=1e6,
    head_bytes=4e5,
    dtype="float16",
)
# Reads a layer in 2 ms and computes a token in 0.02 ms, so that 100 tokens take as long as reading.
ROOFLINE = Roofline(
    flops=2e11,
    memory_bandwidth_bytes_per_s=2e9,
    launch_s=0.01,
    step_s=0.1,
    flops_reached=0.5,
    bandwidth_reached=0.5,
)


def seconds(**counts: float) -> float:
    """Of one of its layers."""
    cost = ROOFLINE.stage_cost(SMALL)
    return cost.time_s(num_layers=1, batch=BatchShape(**counts), first=False, last=False) - 0.1


@pytest.mark.parametrize("name", DEVICES)
def test_the_device_files_are_what_their_table_and_the_published_timings_give(name: str) -> None:
    assert load_device(device_path(name, folder=Path())) == device(name)


def test_a_layer_takes_as_long_as_reading_or_computing_it_whichever_is_longer() -> None:
    assert seconds(decode_tokens=1) == pytest.approx(0.01 + 2e-3)
    assert seconds(decode_tokens=100) == pytest.approx(0.01 + 2e-3)
    assert seconds(decode_tokens=300) == pytest.approx(0.01 + 3 * 2e-3)


def test_attention_reads_the_cache_and_computes_the_pairs() -> None:
    assert seconds(decode_tokens=1, decode_context_tokens=1000) == pytest.approx(seconds(decode_tokens=1) + 1e5 / 1e9)
    pairs = 1000.0  # four operations each for 100 hidden elements
    assert seconds(prefill_tokens=1, prefill_pairs=pairs) == pytest.approx(seconds(prefill_tokens=1) + 4e5 / 1e11)


def test_the_head_is_read_once_and_computed_for_each_token_that_is_sampled() -> None:
    cost = ROOFLINE.stage_cost(SMALL)
    times = [
        cost.time_s(num_layers=0, batch=BatchShape(sampled_tokens=count), first=False, last=True) for count in (0, 3)
    ]
    assert times == pytest.approx([4e5 / 1e9, 4e5 / 1e9 + 3 * 2 * 2e5 / 1e11])


def test_a_device_that_computes_slower_than_it_reads_has_no_free_tokens() -> None:
    slow = msgspec.structs.replace(ROOFLINE, flops=2e8)
    cost = slow.stage_cost(SMALL)
    one, two = (cost.scope_s("layer", BatchShape(decode_tokens=count)) for count in (1, 2))
    assert one == pytest.approx(0.01 + 2e6 / 1e8)
    assert two - one == pytest.approx(2e6 / 1e8)


@given(layer_bytes=st.floats(1e3, 1e10), tokens=st.integers(1, 2000))
def test_weights_of_any_size_give_a_cost(layer_bytes: float, tokens: int) -> None:
    facts = msgspec.structs.replace(SMALL, layer_weight_bytes=layer_bytes)
    batch = BatchShape(decode_tokens=tokens)
    expected = max(layer_bytes / 1e9, tokens * layer_bytes / 1e11)
    assert ROOFLINE.stage_cost(facts).scope_s("layer", batch) == pytest.approx(0.01 + expected)


@pytest.mark.parametrize("name", ["A100-40GB", "L4", "T4", "V100"])
def test_published_timings_are_taken_for_layers_of_the_same_sizes_and_peak_rates_for_others(name: str) -> None:
    shipped = load_device(device_path(name, folder=Path()))
    published = load_record(PUBLISHED, ClusterProfile).model
    assert shipped.stage_times(published).origin == "published timings"
    assert shipped.stage_times(SMALL).origin == "data sheet"


def test_a_device_without_times_for_a_model_names_both() -> None:
    tables = msgspec.structs.replace(load_device(device_path("T4", folder=Path())), roofline=None)
    with pytest.raises(InputError, match=r"device T4: has no times for small .layers of 2 MB.*only for llama2-70b"):
        tables.stage_times(SMALL)


def profiled(**changes: Any) -> ClusterProfile:
    node = cost_node("a")
    assert node.cost is not None
    cost = msgspec.structs.replace(node.cost, workspace_bytes=1e8)
    nodes = (msgspec.structs.replace(node, cost=cost, **changes), table_node("b", [100.0]))
    return ClusterProfile(model=cluster_model(4), nodes=nodes)


def test_an_exported_device_has_the_times_memory_and_nic_of_the_node(tmp_path: Path) -> None:
    cluster = profiled(nic_out_bytes_per_s=2e9, nic_in_bytes_per_s=1e9)
    node = cluster.node("a")
    assert node.cost is not None
    save_record(tmp_path / "my.json", device_of_node(cluster, "a"))

    mine = load_device(device_path("my.json", folder=tmp_path))

    times = mine.stage_times(cluster.model)
    assert times.cost.stage == node.cost.stage
    assert times.origin == "profile"
    assert mine.memory_bytes == node.device.memory_bytes - 1e8
    assert mine.nic_bytes_per_s == 1e9


def test_only_a_node_with_stage_times_is_exported() -> None:
    with pytest.raises(InputError, match="node c: no such node in the profile; it has a, b"):
        device_of_node(profiled(), "c")
    with pytest.raises(InputError, match="node b: has a capacity table but no stage times"):
        device_of_node(profiled(), "b")


def test_a_node_says_that_its_device_is_emulated_and_from_what() -> None:
    made = EmulatedDevice(name="mine", memory_bytes=1e9, roofline=ROOFLINE)
    assert made.describe().label == "mine (emulated, data sheet)"
    assert made.describe(memory_bytes=5e8).memory_bytes == 5e8
    other = msgspec.structs.replace(made, memory_bytes=2e9)
    assert made.describe().facts["device_digest"] != other.describe().facts["device_digest"]


def test_an_unknown_device_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(InputError, match=r"emulated device B200: not known; there are A100-40GB, .*V100"):
        device_path("B200", folder=Path())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flops": 0.0}, "flops: need a finite value > 0"),
        ({"memory_bandwidth_bytes_per_s": float("inf")}, "memory_bandwidth_bytes_per_s: need a finite value"),
        ({"flops_reached": 1.5}, "flops_reached: need a share of the peak"),
        ({"launch_s": -1.0}, "launch_s, step_s: need finite seconds >= 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens: need >= 1"),
    ],
)
def test_impossible_rooflines_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        msgspec.structs.replace(ROOFLINE, **changes)


def test_a_device_without_any_times_is_refused() -> None:
    with pytest.raises(ValueError, match="need `times` of some model, or a `roofline`"):
        EmulatedDevice(name="none", memory_bytes=1e9)
