"""Small clusters for tests: made from a seed, or by hand."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import msgspec

from helixbench.profiler.cluster import (
    COORDINATOR,
    ClusterProfile,
    Coordinator,
    DefaultLink,
    Device,
    Link,
    ModelFacts,
    Node,
)
from helixbench.profiler.cost.measured import MeasuredCost
from helixbench.profiler.cost.model import StageCost
from helixbench.records import load_record
from helixbench.solver.problem.links import LinkTable
from helixbench.solver.problem.workload import Workload, fixed_workload

DATA = Path(__file__).parents[2] / "examples" / "data"
WORKLOAD = fixed_workload(prompt_tokens=100, output_tokens=50)


def published(name: str) -> ClusterProfile:
    """A published cluster by file name; examples/data/README.md names its source."""
    return load_record(DATA / "clusters" / f"{name}.json", ClusterProfile)


def model(num_layers: int, **fields: float) -> ModelFacts:
    sizes: dict[str, float] = {
        "activation_bytes_per_token": 1000.0,
        "token_bytes": 2.0,
        "layer_weight_bytes": 1e6,
        "kv_bytes_per_token_per_layer": 100.0,
    }
    return ModelFacts(name="toy", num_layers=num_layers, **(sizes | fields))


def table_node(name: str, table: list[float], *, memory_bytes: float = 1e9, **fields: object) -> Node:
    return Node(
        name=name,
        device=Device(kind="cuda", name=f"gpu{len(table)}", memory_bytes=memory_bytes),
        max_layers=len(table),
        capacity_tokens_per_s=tuple(table),
        **fields,  # type: ignore[arg-type]
    )


def cost_node(
    name: str, *, speed: float = 1.0, max_layers: int = 16, memory_bytes: float = 1e9, **fields: object
) -> Node:
    """A node with a measured cost of plausible shape; ``speed`` divides every time."""
    stage = StageCost(
        step_s=1e-3 / speed,
        step_item_s=2e-5 / speed,
        step_token_s=1e-6 / speed,
        layer_s=5e-4 / speed,
        token_knots=(1.0, 8.0, 32.0, 128.0),
        layer_token_s=(1e-5 / speed, 2e-5 / speed, 4e-5 / speed, 5e-5 / speed),
        layer_decode_item_s=1e-5 / speed,
        layer_decode_context_s=1e-7 / speed,
        layer_prefill_chunk_s=1e-4 / speed,
        layer_prefill_pair_s=1e-8 / speed,
        embed_s=1e-4 / speed,
        embed_token_s=1e-6 / speed,
        head_s=5e-4 / speed,
        head_item_s=1e-4 / speed,
        max_tokens=512,
        max_context_tokens=8192,
    )
    return Node(
        name=name,
        device=Device(kind="cpu", name=f"cpu{speed:g}", memory_bytes=memory_bytes),
        max_layers=max_layers,
        cost=MeasuredCost(
            stage=stage,
            samples=(),
            held_out_error_median=0.02,
            held_out_error_p90=0.06,
            workspace_bytes=1e6,
            max_batch_tokens=256,
            source="made by hand",
        ),
        **fields,  # type: ignore[arg-type]
    )


def random_cluster(seed: int, *, max_nodes: int = 4, max_layers: int = 6) -> ClusterProfile:
    """A tiny cluster in which links, network cards, memory or nodes may bind, of either kind of node or both."""
    rng = random.Random(seed)
    num_layers = rng.randint(2, max_layers)
    num_nodes = rng.randint(1, max_nodes)
    kinds = rng.choice(["table", "cost", "both"])
    nodes = []
    for number in range(num_nodes):
        most = (
            rng.randint(-(-num_layers // num_nodes), num_layers)
            if num_nodes < 3
            else rng.randint(1, min(3, num_layers))
        )
        cards = {
            "nic_out_bytes_per_s": rng.choice([None, rng.uniform(1e5, 3e6)]),
            "nic_in_bytes_per_s": rng.choice([None, rng.uniform(1e5, 3e6)]),
        }
        if kinds == "table" or (kinds == "both" and rng.random() < 0.5):
            best = rng.uniform(500, 3000)
            table = [best / k * rng.uniform(0.7, 1.1) for k in range(1, most + 1)]
            nodes.append(table_node(f"n{number}", table, **cards))
        else:
            nodes.append(cost_node(f"n{number}", speed=rng.uniform(0.3, 2.0), max_layers=most, **cards))
    names = [COORDINATOR, *(node.name for node in nodes)]
    links = [
        Link(src=a, dst=b, bandwidth_bytes_per_s=_bandwidth(rng, a, b))
        for a in names
        for b in names
        if a != b and rng.random() < 0.5
    ]
    default = rng.choice([None, DefaultLink(1e9), DefaultLink(1e9), *[DefaultLink(rng.uniform(2e5, 2e6))] * 3])
    coordinator = Coordinator(nic_out_bytes_per_s=rng.choice([None, rng.uniform(1e3, 1e4)]))
    return ClusterProfile(
        model=model(num_layers, head_bytes=rng.choice([0.0, 5e5])),
        nodes=tuple(nodes),
        links=tuple(links),
        default_link=default,
        coordinator=coordinator,
    )


def in_regions(profile: ClusterProfile, seed: int) -> ClusterProfile:
    """The same cluster with its nodes in two or three regions, and slower links between them than it had."""
    rng = random.Random(seed)
    nodes = tuple(
        msgspec.structs.replace(node, region=f"region-{rng.randrange(rng.choice([2, 3]))}") for node in profile.nodes
    )
    region = {node.name: node.region for node in nodes}
    between = rng.choice([1e2, 1e4, 1e5, 5e5])
    links = {(link.src, link.dst): link for link in profile.links}
    for src in region:
        for dst in region:
            if region[src] != region[dst] and rng.random() < 0.8:
                links[src, dst] = Link(src=src, dst=dst, bandwidth_bytes_per_s=between * rng.uniform(0.5, 1.5))
    return msgspec.structs.replace(profile, nodes=nodes, links=tuple(links.values()))


def without_labels(profile: ClusterProfile, seed: int) -> ClusterProfile:
    """The same cluster without labels: every link varies by 30 %, each way by itself, and one pair of nodes is odd."""
    rng = random.Random(seed)
    table = LinkTable(profile)
    names = [node.name for node in profile.nodes]
    odd = set(rng.sample(names, 2)) if len(names) > 1 else set()
    factor = rng.choice([100.0, 0.01])  # of the odd pair: as fast as links inside regions, or as slow as those between
    links = []
    for src, dst in itertools.permutations([COORDINATOR, *names], 2):
        bandwidth, latency = table.bandwidth(src, dst), table.latency_s(src, dst)
        if bandwidth is not None and latency is not None:
            by = factor if {src, dst} == odd else 1.0
            bandwidth, latency = bandwidth * by * rng.uniform(0.7, 1.3), latency / by * rng.uniform(0.7, 1.3)
            links.append(Link(src=src, dst=dst, bandwidth_bytes_per_s=bandwidth, latency_s=latency))
    nodes = tuple(msgspec.structs.replace(node, region="") for node in profile.nodes)
    coordinator = msgspec.structs.replace(profile.coordinator, region="")
    return msgspec.structs.replace(profile, nodes=nodes, links=tuple(links), default_link=None, coordinator=coordinator)


def _bandwidth(rng: random.Random, src: str, dst: str) -> float:
    return rng.uniform(5e2, 1e4) if COORDINATOR in (src, dst) else rng.uniform(1e5, 3e6)


def demo_cluster(*, bandwidth_bytes_per_s: float = 1e7) -> ClusterProfile:
    """Four measured nodes of different speed and memory, 16 layers."""
    speeds = {"big": (2.0, 16), "mid": (1.0, 10), "small-1": (0.5, 6), "small-2": (0.4, 6)}
    return ClusterProfile(
        model=model(16, head_bytes=1e6, embedding_bytes=1e6),
        nodes=tuple(cost_node(name, speed=speed, max_layers=most) for name, (speed, most) in speeds.items()),
        default_link=DefaultLink(bandwidth_bytes_per_s, 1e-3),
    )


def trace(seed: int, count: int = 50) -> Workload:
    rng = random.Random(seed)
    return Workload(source="random", lengths=tuple((rng.randint(1, 200), rng.randint(1, 100)) for _ in range(count)))
