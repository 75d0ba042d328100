"""Regions by the links alone: whatever the labels say, with links that vary, differ by direction, or are odd."""

from __future__ import annotations

from collections import defaultdict

import msgspec
import pytest

from helixbench.profiler.cluster import ClusterProfile, DefaultLink, Link
from helixbench.solver import Plan, SolveConfig, solve_placement
from helixbench.solver.problem.regions import inferred_regions, region_notes
from helixbench.solver.questions.generate import make_cluster
from tests.solver.clusters import WORKLOAD, model, published, table_node, without_labels

replace = msgspec.structs.replace


def groups(regions: dict[str, str]) -> set[frozenset[str]]:
    members: dict[str, set[str]] = defaultdict(set)
    for name, region in regions.items():
        members[region].add(name)
    return set(map(frozenset, members.values()))


def labelled(profile: ClusterProfile) -> dict[str, str]:
    return {node.name: node.region for node in profile.nodes}


def two_places(*, odd_label: str = "west") -> ClusterProfile:
    """``n0`` to ``n3`` are in the west, ``n4`` to ``n7`` in the east; ``n0`` is labelled as is said."""
    place = {f"n{i}": "west" if i < 4 else "east" for i in range(8)}
    nodes = tuple(table_node(name, [100.0], region=region) for name, region in place.items())
    slow = tuple(
        Link(src=a, dst=b, bandwidth_bytes_per_s=1e6, latency_s=0.05)
        for a in place
        for b in place
        if place[a] != place[b]
    )
    nodes = (replace(nodes[0], region=odd_label), *nodes[1:])
    return ClusterProfile(model=model(4), nodes=nodes, links=slow, default_link=DefaultLink(1e9, 1e-4))


@pytest.mark.parametrize("regions", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_links_that_vary_with_one_odd_pair_give_the_regions_they_were_made_of(regions: int, seed: int) -> None:
    profile = make_cluster(num_nodes=12 + 8 * regions, num_types=3, num_regions=regions, seed=seed)
    assert groups(inferred_regions(without_labels(profile, seed))) == groups(labelled(profile))


def test_labels_that_agree_with_the_links_name_the_regions() -> None:
    profile = make_cluster(num_nodes=20, num_types=3, num_regions=3, seed=1)
    assert inferred_regions(profile) == labelled(profile)
    assert region_notes(profile, inferred_regions(profile)) == ()


def test_regions_without_labels_are_numbered_in_the_order_of_the_nodes() -> None:
    found = inferred_regions(published("published24-three-regions-llama70b"))
    assert list(dict.fromkeys(found.values())) == ["group-1", "group-2", "group-3"]
    assert groups(found) == {
        frozenset(["a100-0", "a100-1", "a100-2", "a100-3"]),
        frozenset(["l4-4", "l4-5", *(f"t4-{i}" for i in range(6, 14))]),
        frozenset([*(f"l4-{i}" for i in range(14, 20)), *(f"t4-{i}" for i in range(20, 24))]),
    }


def test_one_region_without_labels_has_no_name() -> None:
    assert set(inferred_regions(published("published24-llama70b")).values()) == {""}


def test_a_label_that_contradicts_the_links_is_noted_in_the_plan() -> None:
    profile = two_places(odd_label="east")
    regions = inferred_regions(profile)
    assert regions["n0"] == "west"
    plan = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow", time_limit_s=2))
    assert isinstance(plan, Plan)
    said = "regions follow the links, which contradict the labels: n0 (labelled east) in west"
    assert said in plan.assumptions.notes
    assert plan.nodes["n0"].region == "west"


def test_one_label_for_two_places_becomes_two_names() -> None:
    profile = two_places()
    profile = replace(profile, nodes=tuple(replace(node, region="here") for node in profile.nodes))
    regions = inferred_regions(profile)
    assert regions == {f"n{i}": "here" if i < 4 else "here-2" for i in range(8)}
    assert "n4, n5, n6, n7 (labelled here) in here-2" in region_notes(profile, regions)[0]


def test_latency_alone_parts_regions_as_bandwidth_does() -> None:
    profile = two_places()
    far = replace(profile, links=tuple(replace(link, bandwidth_bytes_per_s=1e9) for link in profile.links))
    slow = replace(profile, links=tuple(replace(link, latency_s=1e-4) for link in profile.links))
    assert groups(inferred_regions(far)) == groups(inferred_regions(slow)) == groups(labelled(profile))


def test_links_that_are_all_fast_make_one_region() -> None:
    profile = two_places()
    fast = replace(profile, links=tuple(replace(k, bandwidth_bytes_per_s=2e9, latency_s=1e-5) for k in profile.links))
    assert len(groups(inferred_regions(fast))) == 1


def test_parts_that_are_not_connected_are_regions() -> None:
    profile = two_places()
    place = labelled(profile)
    inside = tuple(
        Link(src=a, dst=b, bandwidth_bytes_per_s=1e9) for a in place for b in place if a != b and place[a] == place[b]
    )
    assert groups(inferred_regions(replace(profile, links=inside, default_link=None))) == groups(place)
