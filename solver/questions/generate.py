"""Synthetic clusters from a seed: nodes of several types in several regions, with slow and unequal links between them.

Figures of the types are of the size of published ones for a model of 80 layers; nothing here was measured.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from helixbench.errors import InputError
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
from helixbench.records import provenance_now

NUM_LAYERS = 80
LAYER_WEIGHT_BYTES = 1.53e9
KV_BYTES_PER_TOKEN_PER_LAYER = 4096.0
ACTIVATION_BYTES_PER_TOKEN = 16384.0
TOKEN_BYTES = 2.0
INSIDE = DefaultLink(1.25e9, 1e-3)
BETWEEN_BYTES_PER_S = 12.5e6
BETWEEN_SPREAD = 0.2
BETWEEN_LATENCY_S = 0.05


@dataclass(frozen=True)
class _Type:
    """A kind of device: ``one_layer_tokens_per_s`` with one layer held, falling a little faster than in proportion."""

    name: str
    memory_bytes: float
    one_layer_tokens_per_s: float


TYPES = (
    _Type("A100", 40e9, 23800.0),
    _Type("L4", 24e9, 7550.0),
    _Type("T4", 16e9, 5700.0),
    _Type("V100", 16e9, 11800.0),
    _Type("H100", 80e9, 52000.0),
    _Type("A10", 24e9, 9400.0),
    _Type("RTX4090", 24e9, 15500.0),
    _Type("A6000", 48e9, 13600.0),
)


def make_cluster(
    *, num_nodes: int, num_types: int, num_regions: int, seed: int, num_layers: int = NUM_LAYERS
) -> ClusterProfile:
    """A cluster from a seed. The coordinator is in the first region.

    Links inside a region carry 1.25 GB/s at 1 ms, those between two regions 12.5 MB/s +- 20 % at 50 ms, each pair of
    nodes its own and each direction by itself.

    Raises:
        InputError: a number out of range.
    """
    if not 1 <= num_types <= len(TYPES):
        raise InputError(f"--types {num_types}: need 1 to {len(TYPES)}")
    if num_nodes < max(num_types, num_regions) or num_regions < 1:
        raise InputError(f"--nodes {num_nodes} --regions {num_regions}: need a node of each type and in each region")
    if num_layers < 1:
        raise InputError(f"--layers {num_layers}: need at least 1")
    rng = random.Random(seed)
    types = rng.sample(TYPES, num_types)
    chosen = [*types, *(rng.choice(types) for _ in range(num_nodes - num_types))]
    regions = [*range(num_regions), *(rng.randrange(num_regions) for _ in range(num_nodes - num_regions))]
    rng.shuffle(chosen)
    rng.shuffle(regions)
    nodes = tuple(
        _node(f"{kind.name.lower()}-{number}", kind, _region(region))
        for number, (kind, region) in enumerate(zip(chosen, regions, strict=True))
    )
    return ClusterProfile(
        model=ModelFacts(
            name=f"{num_layers} layers of 1.53 GB",
            num_layers=num_layers,
            activation_bytes_per_token=ACTIVATION_BYTES_PER_TOKEN,
            token_bytes=TOKEN_BYTES,
            layer_weight_bytes=LAYER_WEIGHT_BYTES,
            kv_bytes_per_token_per_layer=KV_BYTES_PER_TOKEN_PER_LAYER,
        ),
        nodes=nodes,
        links=_slow_links(nodes, rng),
        default_link=INSIDE,
        coordinator=Coordinator(nic_out_bytes_per_s=1e10, nic_in_bytes_per_s=1e10, region=_region(0)),
        provenance=provenance_now(note=f"{num_nodes} nodes, {num_types} types, {num_regions} regions, seed {seed}"),
    )


def _region(number: int) -> str:
    return f"region-{number}"


def _node(name: str, kind: _Type, region: str) -> Node:
    max_layers = int(kind.memory_bytes / 2 // LAYER_WEIGHT_BYTES)
    # The larger the weights, the less KV cache, the smaller the batch: capacity falls faster than one over the layers.
    table = tuple(kind.one_layer_tokens_per_s / k * (1 - 0.5 * (k - 1) / max_layers) for k in range(1, max_layers + 1))
    return Node(
        name=name,
        device=Device(kind="cuda", name=kind.name, memory_bytes=kind.memory_bytes),
        max_layers=max_layers,
        capacity_tokens_per_s=table,
        nic_out_bytes_per_s=1e10,
        nic_in_bytes_per_s=1e10,
        region=region,
    )


def _slow_links(nodes: tuple[Node, ...], rng: random.Random) -> tuple[Link, ...]:
    ends = [(COORDINATOR, _region(0)), *((node.name, node.region) for node in nodes)]
    return tuple(
        Link(
            src=src,
            dst=dst,
            bandwidth_bytes_per_s=BETWEEN_BYTES_PER_S * rng.uniform(1 - BETWEEN_SPREAD, 1 + BETWEEN_SPREAD),
            latency_s=BETWEEN_LATENCY_S,
        )
        for src, here in ends
        for dst, there in ends
        if here != there
    )
