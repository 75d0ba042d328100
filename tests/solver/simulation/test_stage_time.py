from __future__ import annotations

import itertools
import statistics

import msgspec
import pytest

from helixbench.profiler.cluster import ClusterProfile, DefaultLink
from helixbench.profiler.cost.model import BatchShape, StageCost
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, LinkFlow
from helixbench.solver.problem.workload import fixed_workload
from helixbench.solver.simulation.closed_loop import simulate_closed_loop
from helixbench.solver.simulation.stage_time import StageTimer
from tests.solver.clusters import WORKLOAD, cost_node, model, table_node


def stage(**changes: float) -> StageCost:
    cost = cost_node("any").cost
    assert cost is not None
    return msgspec.structs.replace(cost.stage, **changes)


def test_single_iterations_scatter_as_measured_around_the_same_mean() -> None:
    def seconds(variation: float, seed: str) -> list[float]:
        timer = StageTimer(stage(variation=variation), LayerRange(0, 4), num_layers=8, seed=seed)
        return [timer.seconds({0: (0, 0, 0, 8, 800, 8)}) for _ in range(4000)]

    (mean,) = set(seconds(0.0, "any"))
    scattered = seconds(0.2, "0 a")
    assert statistics.fmean(scattered) == pytest.approx(mean, rel=0.02)
    assert statistics.stdev(scattered) / mean == pytest.approx(0.2, rel=0.1)
    assert seconds(0.2, "0 a") == scattered
    assert seconds(0.2, "0 b") != scattered


def test_nodes_in_a_row_lose_throughput_where_their_iterations_scatter() -> None:
    """Four groups of sequences on four nodes: each waits for the slowest before it."""
    names = [f"n{index}" for index in range(4)]

    def throughput(variation: float) -> float:
        nodes = []
        for name in names:
            node = cost_node(name, max_layers=2)
            assert node.cost is not None
            even = {"embed_s": 0.0, "embed_token_s": 0.0, "head_s": 0.0, "head_item_s": 0.0}
            varied = msgspec.structs.replace(node.cost.stage, variation=variation, **even)
            nodes.append(msgspec.structs.replace(node, cost=msgspec.structs.replace(node.cost, stage=varied)))
        profile = ClusterProfile(model=model(8), nodes=tuple(nodes), default_link=DefaultLink(1e9, 1e-6))
        places = {name: LayerRange(2 * index, 2 * index + 2) for index, name in enumerate(names)}
        way = ["coordinator", *names, "coordinator"]
        flows = [
            LinkFlow(src=a, dst=b, flow_tokens_per_s=1.0, capacity_tokens_per_s=1e9) for a, b in itertools.pairwise(way)
        ]
        decoding = fixed_workload(prompt_tokens=1, output_tokens=200)
        rolled = simulate_closed_loop(Capacities(profile, decoding), places, flows, 32, max_decode_batch=8)
        assert rolled is not None
        return rolled.expected.total_tokens_per_s

    steady, scattered, wild = throughput(0.0), throughput(0.15), throughput(0.4)
    assert 0.85 * steady < scattered < 0.97 * steady
    assert wild < scattered


def test_a_table_is_timed_where_only_its_first_range_does_not_fit() -> None:
    """The embedding fits no node; the ranges behind it do."""
    node = table_node("a", [100.0, 40.0], memory_bytes=1e8)
    profile = ClusterProfile(model=model(4, embedding_bytes=1e9), nodes=(node,), default_link=DefaultLink(1e9))
    capacities = Capacities(profile, WORKLOAD)
    cost = capacities.stage_cost("a", LayerRange(1, 3))
    full = BatchShape(decode_tokens=cost.max_tokens)
    seconds = cost.time_s(num_layers=2, batch=full, first=False, last=False)
    assert cost.max_tokens / seconds == pytest.approx(40.0)
