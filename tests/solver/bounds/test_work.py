"""Bounds are never below what a placement carries, and are met where they should be."""

from __future__ import annotations

import msgspec
import pytest

from helixbench.solver.bounds.configurations import Configurations
from helixbench.solver.bounds.work import coordinator_bound, work_bound
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.questions.generate import make_cluster
from tests.solver.brute_force import best_flow
from tests.solver.clusters import WORKLOAD, published, random_cluster

replace = msgspec.structs.replace


def check_bounds(seed: int) -> None:
    """One random cluster: no bound is below brute force, and nothing that brute force carries is excluded."""
    profile = random_cluster(seed)
    partial, concurrency = seed % 2 == 0, 4 if seed % 3 == 0 else None
    pins = _pins(capacities_of(profile), seed)
    capacities = Capacities(profile, WORKLOAD, concurrency=concurrency, pins=pins, partial=partial)
    best = best_flow(capacities)
    work = work_bound(capacities)
    configurations = Configurations(capacities)
    bound = configurations.bound(low=0.0, high=work)
    assert work >= best * (1 - 1e-9)
    assert coordinator_bound(capacities) >= best * (1 - 1e-9)
    assert best * (1 - 1e-9) <= bound <= work
    if best > 0:
        assert not any(configurations.excludes(best * (1 - 1e-9), cells=cells) for cells in (7, 100, 4000))


def capacities_of(profile: object) -> Capacities:
    return Capacities(profile, WORKLOAD)  # type: ignore[arg-type]


def _pins(capacities: Capacities, seed: int) -> dict[str, LayerRange]:
    """In one of four clusters the first node is pinned."""
    name = next(iter(capacities.nodes))
    longest = capacities.max_layers(name)
    if seed % 4 or longest == 0:
        return {}
    start = seed // 4 % (capacities.model.num_layers - longest + 1)
    return {name: LayerRange(start, start + longest)}


@pytest.mark.parametrize("seed", range(4000, 4050))
def test_no_bound_is_below_what_brute_force_finds(seed: int) -> None:
    check_bounds(seed)


@pytest.mark.parametrize("seed", range(8))
def test_a_faster_node_never_lowers_the_bound(seed: int) -> None:
    profile = make_cluster(num_nodes=6 + seed, num_types=3, num_regions=1, seed=seed)
    node = profile.nodes[0]
    faster = replace(node, capacity_tokens_per_s=tuple(1.3 * rate for rate in node.capacity_tokens_per_s or ()))
    more = replace(profile, nodes=(faster, *profile.nodes[1:]))
    before, after = (bound_of(Capacities(p, WORKLOAD)) for p in (profile, more))
    assert after >= before * (1 - 1e-3)  # the bisection ends within a grid step


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_does_not_depend_on_names_or_order(seed: int) -> None:
    profile = make_cluster(num_nodes=9, num_types=4, num_regions=1, seed=seed)
    nodes = tuple(replace(node, name=f"z{number}") for number, node in enumerate(reversed(profile.nodes)))
    renamed = replace(profile, nodes=nodes, links=())
    assert bound_of(Capacities(renamed, WORKLOAD)) == pytest.approx(bound_of(Capacities(profile, WORKLOAD)), rel=1e-9)


def test_half_a_node_holds_no_layer() -> None:
    """Work alone allows 309 tokens/s and more; single layers only what a node with ten layers carries."""
    capacities = Capacities(published("published8-l4-llama30b"), WORKLOAD)
    work = work_bound(capacities)
    assert work > 300
    assert Configurations(capacities).bound(low=0.0, high=work) == pytest.approx(252.64985, rel=1e-4)


def bound_of(capacities: Capacities) -> float:
    work = work_bound(capacities)
    return Configurations(capacities).bound(low=0.0, high=work)
