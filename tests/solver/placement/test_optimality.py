"""Optimality has a witness: brute force on tiny clusters, a min cut on every placement."""

from __future__ import annotations

import networkx as nx
import pytest

from helixbench.profiler.cluster import COORDINATOR, ClusterProfile
from helixbench.solver import Infeasible, problems_of, solve_placement
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.flow.network import build_network
from helixbench.solver.placement.baselines import METHODS
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange
from tests.solver.brute_force import best_flow, largest_flow
from tests.solver.clusters import WORKLOAD, in_regions, random_cluster


def check_against_brute_force(seed: int) -> None:
    """One random cluster, one of three in several regions: the plan equals brute force, and its bound is not below."""
    profile = random_cluster(seed)
    if seed % 3 == 1:
        profile = in_regions(profile, seed)
    partial, concurrency = seed % 2 == 0, 4 if seed % 3 == 0 else None
    best = best_flow(Capacities(profile, WORKLOAD, concurrency=concurrency), partial=partial)
    answer = solve_placement(profile, WORKLOAD, concurrency=concurrency, objective="max-flow", partial=partial)
    if isinstance(answer, Infeasible):
        assert best == 0, answer.reason
        return
    assert not list(problems_of(profile, answer))
    assert answer.predicted.max_flow_tokens_per_s == pytest.approx(best, rel=1e-6)
    assert answer.predicted.upper_bound_tokens_per_s >= best * (1 - 1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_small_clusters_are_solved_as_brute_force_solves_them(seed: int) -> None:
    check_against_brute_force(seed)


@pytest.mark.parametrize("seed", range(40))
def test_min_cut_equals_flow(seed: int) -> None:
    profile = random_cluster(1000 + seed)
    capacities = Capacities(profile, WORKLOAD)
    for rule in METHODS.values():
        placement = rule(capacities)
        if placement is None:
            continue
        for partial in (True, False):
            flow = max_flow(capacities, placement, partial=partial)
            assert sum(share.tokens_per_s for share in flow.cut) == pytest.approx(flow.tokens_per_s, rel=1e-6, abs=1e-6)
            assert flow.tokens_per_s == pytest.approx(
                largest_flow(capacities, placement, partial=partial), rel=1e-6, abs=1e-6
            )


@pytest.mark.parametrize("seed", range(40))
def test_spreading_work_keeps_the_flow(seed: int) -> None:
    capacities = Capacities(random_cluster(2000 + seed), WORKLOAD)
    placement = METHODS["petals"](capacities)
    if placement is None:
        pytest.skip("this cluster cannot hold its model")
    largest = max_flow(capacities, placement, partial=True)
    spread = max_flow(capacities, placement, partial=True, spread=True)
    assert spread.tokens_per_s == pytest.approx(largest.tokens_per_s, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("seed", range(30))
def test_pure_networks_agree_with_networkx(seed: int) -> None:
    profile = random_cluster(3000 + seed)
    profile = _without_cards(profile)
    capacities = Capacities(profile, WORKLOAD)
    placement = METHODS["petals"](capacities)
    if placement is None:
        pytest.skip("this cluster cannot hold its model")
    value, (_, beyond) = nx.minimum_cut(_graph(capacities, placement), "source", "sink")
    assert max_flow(capacities, placement, partial=False).tokens_per_s == pytest.approx(value, abs=1e-6)
    assert "sink" in beyond


def _without_cards(profile: ClusterProfile) -> ClusterProfile:
    import msgspec

    nodes = tuple(msgspec.structs.replace(n, nic_in_bytes_per_s=None, nic_out_bytes_per_s=None) for n in profile.nodes)
    coordinator = msgspec.structs.replace(profile.coordinator, nic_in_bytes_per_s=None, nic_out_bytes_per_s=None)
    return msgspec.structs.replace(profile, nodes=nodes, coordinator=coordinator)


def _graph(capacities: Capacities, placement: dict[str, LayerRange]) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(["source", "sink"])
    for name, held in placement.items():
        graph.add_edge((name, "in"), (name, "out"), capacity=capacities.tokens_per_s(name, held))
    for arc in build_network(capacities, placement, partial=False).arcs:
        tail = "source" if arc.src == COORDINATOR else (arc.src, "out")
        head = "sink" if arc.dst == COORDINATOR else (arc.dst, "in")
        graph.add_edge(tail, head, capacity=arc.capacity_tokens_per_s)
    return graph
