"""A max-flow has a witness, by either method: an independent linear program, conservation, and a min cut."""

from __future__ import annotations

from collections import defaultdict

import msgspec
import networkx as nx
import pytest

from helixbench.profiler.cluster import COORDINATOR, ClusterProfile, DefaultLink, Link
from helixbench.solver.flow import linear_program
from helixbench.solver.flow import max_flow as module
from helixbench.solver.flow.max_flow import Flow, max_flow, solve_network
from helixbench.solver.flow.network import SINK, SOURCE, Network, build_network
from helixbench.solver.flow.spread import cache_shares
from helixbench.solver.placement.baselines import METHODS, petals
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Placement
from helixbench.solver.questions.generate import make_cluster
from tests.solver.brute_force import largest_flow
from tests.solver.clusters import WORKLOAD, cost_node, model, random_cluster, table_node


def check_flow(network: Network, flow: Flow) -> None:
    """Conservation, capacities and shares hold; the cut adds up to the flow and parts source and sink."""
    slack = 1e-6 * max(flow.tokens_per_s, 1e-6)
    balance: defaultdict[object, float] = defaultdict(float)
    for (tail, head), amount in flow.on_edge.items():
        assert -slack <= amount <= network.graph.edges[tail, head].get("capacity", float("inf")) + slack
        balance[tail] -= amount
        balance[head] += amount
    assert balance.pop(SINK, 0.0) == pytest.approx(flow.tokens_per_s, abs=slack)
    assert balance.pop(SOURCE, 0.0) == pytest.approx(-flow.tokens_per_s, abs=slack)
    assert all(abs(amount) <= slack for amount in balance.values())
    for mixed in network.mixed:
        assert sum(share * flow.on_edge[edge] for edge, share in mixed.use.items()) <= 1 + 1e-6
    assert sum(share.tokens_per_s for share in flow.cut) == pytest.approx(flow.tokens_per_s, rel=1e-6, abs=1e-6)
    cut = {(share.kind, share.name) for share in flow.cut}
    left = network.graph.copy()
    left.remove_edges_from([edge for edge, resource, _ in network.limits() if resource in cut])
    left.remove_edges_from([edge for mixed in network.mixed if mixed.resource in cut for edge in mixed.use])
    assert not nx.has_path(left, SOURCE, SINK)


def placements_of(capacities: Capacities) -> list[Placement]:
    return [placement for rule in METHODS.values() if (placement := rule(capacities))]


@pytest.mark.parametrize("seed", range(40))
def test_a_flow_is_the_largest_and_its_min_cut_proves_it(seed: int) -> None:
    for partial in (True, False):
        capacities = Capacities(random_cluster(1000 + seed), WORKLOAD, partial=partial)
        for placement in placements_of(capacities):
            network = build_network(capacities, placement)
            flow = solve_network(network)
            check_flow(network, flow)
            assert flow.tokens_per_s == pytest.approx(largest_flow(capacities, placement), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("seed", range(30))
def test_the_graph_and_the_linear_program_agree_where_the_network_is_pure(seed: int) -> None:
    capacities = Capacities(random_cluster(3000 + seed), WORKLOAD, partial=False)
    for placement in placements_of(capacities):
        network = build_network(capacities, placement)
        assert network.is_pure
        flows = [module._as_flow(network, *by(network)) for by in (module._by_preflow_push, module._by_program)]
        for flow in flows:
            check_flow(network, flow)
        assert flows[0].tokens_per_s == pytest.approx(flows[1].tokens_per_s, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("seed", range(40))
def test_spreading_work_keeps_the_flow(seed: int) -> None:
    capacities = Capacities(random_cluster(2000 + seed), WORKLOAD)
    placement = petals(capacities)
    if placement is None:
        pytest.skip("this cluster cannot hold its model")
    largest = max_flow(capacities, placement)
    network = build_network(capacities, placement)
    spread = solve_network(network, shares=cache_shares(capacities, placement))
    check_flow(network, spread)
    assert spread.tokens_per_s == pytest.approx(largest.tokens_per_s, rel=1e-6, abs=1e-6)


OVERLAPPING = {"a": LayerRange(0, 2), "b": LayerRange(1, 4), "c": LayerRange(2, 4)}


def cluster_of(kind: str, **nic_in: float) -> ClusterProfile:
    """Three nodes of up to 4 layers; under ``OVERLAPPING`` b is entered late, from a."""
    rates = [100.0, 50.0, 30.0, 20.0]
    nodes = [table_node(n, rates) if kind == "table" else cost_node(n, max_layers=4) for n in "abc"]
    nodes = [msgspec.structs.replace(node, nic_in_bytes_per_s=nic_in.get(node.name)) for node in nodes]
    return ClusterProfile(model=model(4), nodes=tuple(nodes), default_link=DefaultLink(1e9))


@pytest.mark.parametrize(("kind", "is_pure"), [("table", True), ("cost", False)])
def test_only_entries_of_different_cost_need_a_linear_program(kind: str, is_pure: bool) -> None:
    placement = OVERLAPPING | {"d": LayerRange(0, 1)}
    profile = cluster_of(kind)
    profile = msgspec.structs.replace(
        profile, nodes=(*profile.nodes, msgspec.structs.replace(profile.nodes[0], name="d"))
    )
    capacities = Capacities(profile, WORKLOAD)
    network = build_network(capacities, placement)
    assert network.is_pure == is_pure
    assert {m.resource for m in network.mixed} == (set() if is_pure else {("node", "a"), ("node", "b")})
    flow = solve_network(network)
    check_flow(network, flow)
    assert flow.tokens_per_s == pytest.approx(largest_flow(capacities, placement), rel=1e-6)


@pytest.mark.parametrize(("messages_per_s", "is_pure"), [(10.0, False), (1000.0, True)])
def test_a_nic_that_receives_token_ids_and_states_is_a_constraint_where_it_can_bind(
    messages_per_s: float, is_pure: bool
) -> None:
    """Node b holds the first layers and is also entered from a, which ends inside its range."""
    placement = {"a": LayerRange(0, 1), "b": LayerRange(0, 4)}
    profile = cluster_of("table", b=messages_per_s * model(4).activation_bytes_per_token)
    capacities = Capacities(profile, WORKLOAD)
    network = build_network(capacities, placement)
    assert network.is_pure == is_pure
    flow = solve_network(network)
    check_flow(network, flow)
    assert flow.tokens_per_s == pytest.approx(largest_flow(capacities, placement), rel=1e-6)


@pytest.mark.parametrize("kind", ["table", "cost"])
def test_scaled_resources_scale_the_flow(kind: str) -> None:
    network = build_network(Capacities(cluster_of(kind), WORKLOAD), OVERLAPPING)
    everything = [resource for _, resource, _ in network.limits()] + [mixed.resource for mixed in network.mixed]
    before = solve_network(network).tokens_per_s
    assert solve_network(network.scaled(dict.fromkeys(everything, 3.0))).tokens_per_s == pytest.approx(3 * before)
    assert solve_network(network).tokens_per_s == before, "the network itself stays as it was"


def test_a_placement_without_a_way_through_carries_nothing() -> None:
    links = (Link(src=COORDINATOR, dst="a", bandwidth_bytes_per_s=1e6),)
    profile = msgspec.structs.replace(cluster_of("table"), default_link=None, links=links)
    flow = max_flow(Capacities(profile, WORKLOAD), OVERLAPPING, spread=True)
    assert (flow.tokens_per_s, flow.links, flow.cut, dict(flow.entries)) == (0.0, (), (), {})


def check_by_interior_point(capacities: Capacities, placement: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_network(capacities, placement)
    exact = solve_network(network)
    monkeypatch.setattr(linear_program, "MANY_EDGES", 0)
    found = module._as_flow(network, *module._by_program(network))
    check_flow(network, found)
    assert found.tokens_per_s == pytest.approx(exact.tokens_per_s, rel=1e-9)
    spread = solve_network(network, shares=cache_shares(capacities, placement))
    assert spread.tokens_per_s == pytest.approx(exact.tokens_per_s, rel=1e-9)


def test_a_flow_by_the_interior_point_method_is_the_same_and_has_its_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    capacities = Capacities(make_cluster(num_nodes=60, num_types=5, num_regions=4, seed=2), WORKLOAD)
    placement = petals(capacities)
    assert placement is not None
    check_by_interior_point(capacities, placement, monkeypatch)


@pytest.mark.parametrize("seed", [seed for seed in range(20) if seed not in (5, 9)])  # they have no placement
def test_so_it_is_on_small_clusters_with_links_and_nics_that_bind(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    capacities = Capacities(random_cluster(seed), WORKLOAD)
    placement = petals(capacities)
    assert placement is not None
    check_by_interior_point(capacities, placement, monkeypatch)
