"""Properties that hold for every cluster."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helixbench.profiler.cluster import COORDINATOR, ClusterProfile, Node
from helixbench.solver import Infeasible, SolveConfig, solve_placement
from tests.solver import clusters
from tests.solver.clusters import WORKLOAD

replace = msgspec.structs.replace
few = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def random_cluster(seed: int) -> ClusterProfile:
    return clusters.random_cluster(seed, max_nodes=3, max_layers=4)


def best(profile: ClusterProfile, *, partial: bool = True) -> float:
    answer = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow", partial=partial))
    return 0.0 if isinstance(answer, Infeasible) else answer.predicted.max_flow_tokens_per_s


def faster(node: Node) -> Node:
    if node.capacity_tokens_per_s is None:
        return replace(node, device=replace(node.device, memory_bytes=node.device.memory_bytes * 2))
    return replace(node, capacity_tokens_per_s=tuple(1.5 * value for value in node.capacity_tokens_per_s))


@few
@given(st.integers(0, 10_000), st.integers(0, 3), st.booleans())
def test_more_capacity_never_lowers_the_optimum(seed: int, which: int, partial: bool) -> None:
    profile = random_cluster(seed)
    which %= len(profile.nodes)
    nodes = tuple(faster(node) if number == which else node for number, node in enumerate(profile.nodes))
    assert best(replace(profile, nodes=nodes), partial=partial) >= best(profile, partial=partial) * (1 - 1e-6)


@few
@given(st.integers(0, 10_000))
def test_faster_links_never_lower_the_optimum(seed: int) -> None:
    profile = random_cluster(seed)
    links = tuple(replace(link, bandwidth_bytes_per_s=2 * link.bandwidth_bytes_per_s) for link in profile.links)
    assert best(replace(profile, links=links)) >= best(profile) * (1 - 1e-6)


@few
@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_renaming_and_reordering_nodes_changes_nothing(seed: int, rng: object) -> None:
    profile = random_cluster(seed)
    new = {node.name: f"z{9 - number}" for number, node in enumerate(profile.nodes)} | {COORDINATOR: COORDINATOR}
    nodes = [replace(node, name=new[node.name]) for node in profile.nodes]
    rng.shuffle(nodes)  # type: ignore[attr-defined]
    links = tuple(replace(link, src=new[link.src], dst=new[link.dst]) for link in profile.links)
    assert best(replace(profile, nodes=tuple(nodes), links=links)) == pytest.approx(best(profile), rel=1e-6)


@few
@given(st.integers(0, 10_000))
def test_partial_inference_never_lowers_the_optimum(seed: int) -> None:
    profile = random_cluster(seed)
    assert best(profile, partial=True) >= best(profile, partial=False) * (1 - 1e-6)
