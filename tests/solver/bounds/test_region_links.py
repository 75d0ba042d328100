"""What links between regions exclude: never what brute force carries, and all but nothing where they carry nothing."""

from __future__ import annotations

import msgspec
import pytest

from helixbench.profiler.cluster import COORDINATOR, ClusterProfile, DefaultLink, Link
from helixbench.solver.bounds.region_links import RegionBound
from helixbench.solver.bounds.work import work_bound
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.placement.regions import regional_placements
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.questions.generate import make_cluster
from tests.solver.brute_force import best_flow
from tests.solver.clusters import WORKLOAD, in_regions, model, random_cluster, table_node

replace = msgspec.structs.replace


def check_region_bound(seed: int) -> float:
    """One random cluster in several regions: the bound is not below brute force; how far it is below that of work."""
    profile = in_regions(random_cluster(seed), seed)
    partial, concurrency = seed % 2 == 0, 4 if seed % 3 == 0 else None
    capacities = Capacities(profile, WORKLOAD, concurrency=concurrency, partial=partial)
    work = work_bound(capacities)
    bound = RegionBound(capacities).bound(high=work)
    assert bound >= best_flow(capacities) * (1 - 1e-9)
    return bound / work if work > 0 else 1.0


def test_no_bound_is_below_what_brute_force_finds_and_some_are_below_that_of_work() -> None:
    shares = [check_region_bound(seed) for seed in range(5000, 5024)]
    assert sum(share < 0.9 for share in shares) >= 5


def test_regions_without_links_between_them_carry_what_each_does_alone() -> None:
    nodes = [table_node(f"n{i}", [1000.0, 500.0], region=f"region-{i % 2}") for i in range(4)]
    slow = [
        Link(src=a.name, dst=b.name, bandwidth_bytes_per_s=1.0) for a in nodes for b in nodes if a.region != b.region
    ]
    profile = ClusterProfile(model=model(2), nodes=tuple(nodes), links=tuple(slow), default_link=DefaultLink(1e9))
    capacities = Capacities(profile, WORKLOAD)
    # Each region: two nodes, two layers, 1000 tokens/s; four links of a thousandth of a token/s each way.
    bound = RegionBound(capacities).bound(high=4000.0)
    assert bound == pytest.approx(2000.004, rel=1e-3)


def test_a_region_that_the_coordinator_does_not_reach_carries_only_what_crosses() -> None:
    profile = make_cluster(num_nodes=12, num_types=3, num_regions=2, seed=3)
    far = [node.name for node in profile.nodes if node.region == "region-1"]
    unreached = [Link(src=COORDINATOR, dst=name, bandwidth_bytes_per_s=1e-3) for name in far]
    kept = [
        replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s / 1e4)
        for link in profile.links
        if COORDINATOR not in (link.src, link.dst)
    ]
    capacities = Capacities(replace(profile, links=(*kept, *unreached)), WORKLOAD)
    near = [node for node in profile.nodes if node.region == "region-0"]
    bound = RegionBound(capacities).bound(high=1e4)
    work = work_bound(capacities, names=[node.name for node in near])
    assert bound <= work + len(near) * len(far) * 12.5e6 * 1.2 / 16384 / 1e4


def test_regions_all_but_cut_off_are_planned_to_within_the_bound() -> None:
    profile = make_cluster(num_nodes=24, num_types=3, num_regions=2, seed=1)
    links = tuple(
        link
        if COORDINATOR in (link.src, link.dst)
        else replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s / 1e4)
        for link in profile.links
    )
    capacities = Capacities(replace(profile, links=links), WORKLOAD)
    work = work_bound(capacities)
    bound = RegionBound(capacities).bound(high=work)
    found = regional_placements(capacities, bound=bound, may_go_on=lambda: True)
    carried = max(max_flow(capacities, placement).tokens_per_s for placement in found)
    assert carried <= bound < 1.05 * carried < 0.9 * work
