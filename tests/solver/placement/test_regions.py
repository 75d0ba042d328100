"""Chains of segments through one or more regions carry what they were planned to, and hold as much as can be."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest

from helixbench.profiler.cluster import Link
from helixbench.solver.bounds.work import work_bound
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.placement.regions import best_parting, regional_placements, widths
from helixbench.solver.placement.segments import Segments, Yard, stock_of
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.questions.generate import make_cluster
from tests.solver.clusters import WORKLOAD


def capacities_of(nodes: int, types: int, regions: int, seed: int) -> Capacities:
    return Capacities(make_cluster(num_nodes=nodes, num_types=types, num_regions=regions, seed=seed), WORKLOAD)


def planned(capacities: Capacities, bound: float) -> list[float]:
    found = regional_placements(capacities, bound=bound, may_go_on=lambda: True)
    return [max_flow(capacities, placement).tokens_per_s for placement in found]


@pytest.mark.parametrize(("nodes", "types", "seed", "optimum"), [(10, 3, 0, 952.0), (20, 7, 4, 4300.0)])
def test_one_region_is_planned_to_its_optimum(nodes: int, types: int, seed: int, optimum: float) -> None:
    assert max(planned(capacities_of(nodes, types, 1, seed), 5000.0)) >= 0.999 * optimum


def test_four_regions_in_a_row_carry_more_than_each_by_itself() -> None:
    """Bound 3204; all links between regions are slow, and no region can hold the model by itself."""
    assert max(planned(capacities_of(28, 4, 4, 7), 3204.0)) >= 3100


@pytest.mark.parametrize("way", ["nic_in_bytes_per_s", "nic_out_bytes_per_s"])
def test_a_node_behind_a_slow_network_card_does_not_spoil_the_plan(way: str) -> None:
    profile = make_cluster(num_nodes=24, num_types=3, num_regions=1, seed=3)
    slow, *others = profile.nodes
    with_slow = msgspec.structs.replace(profile, nodes=(msgspec.structs.replace(slow, **{way: 1e6}), *others))
    without = Capacities(msgspec.structs.replace(profile, nodes=tuple(others)), WORKLOAD)
    high = work_bound(without)
    assert max(planned(Capacities(with_slow, WORKLOAD), high)) >= 0.99 * max(planned(without, high))


def test_a_node_behind_slow_links_does_not_spoil_the_plan_though_it_is_like_others() -> None:
    profile = make_cluster(num_nodes=24, num_types=3, num_regions=1, seed=3)
    slow, *others = profile.nodes
    links = tuple(
        Link(src=src, dst=dst, bandwidth_bytes_per_s=1e6, latency_s=0.02)
        for other in others
        for src, dst in ((slow.name, other.name), (other.name, slow.name))
    )
    with_slow = Capacities(msgspec.structs.replace(profile, links=links), WORKLOAD)
    without = Capacities(msgspec.structs.replace(profile, nodes=tuple(others)), WORKLOAD)
    high = work_bound(without)
    assert {name for name, region in with_slow.regions.items() if region != "region-0"} == {slow.name}
    assert max(planned(with_slow, high)) >= 0.99 * max(planned(without, high))


def longest_by_search(rates: list[np.ndarray], counts: tuple[int, ...], flow: float) -> int:
    """The most layers of blocks of single nodes side by side, by trying every block first and the rest after it."""
    best = 0
    for taken in itertools.product(*(range(count + 1) for count in counts)):
        if not any(taken):
            continue
        for length in range(1, max(map(len, rates)) + 1):
            carried = sum(n * r[length - 1] for n, r in zip(taken, rates, strict=True) if length <= len(r))
            if carried >= flow:
                left = tuple(count - n for count, n in zip(counts, taken, strict=True))
                best = max(best, length + longest_by_search(rates, left, flow))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_a_segment_is_as_long_as_the_longest_by_trying_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Rates that fall as one over the layers and less: nodes in a row never hold more than the same side by side.
    rates = [float(rng.uniform(500, 2000)) / np.arange(1, 4) * (1, 0.7, 0.3) for _ in range(2)]
    yard = Yard({0: 3, 1: 2}, dict(enumerate(rates)))
    found = Segments(yard, 1000.0)
    assert found.longest(None, None) >= longest_by_search(rates, (3, 2), 1000.0)
    parts = found.parts(None, None)
    assert sum(part.num_layers for part in parts) == found.longest(None, None)
    assert all(yard.carries(part) >= 1000 * (1 - 1e-9) for part in parts)
    assert all(sum(part.counts[kind] for part in parts) <= yard.counts[kind] for kind in range(2))


@pytest.mark.parametrize("seed", range(4))
def test_the_parts_of_a_segment_are_what_its_length_says_whatever_its_ends(seed: int) -> None:
    capacities = capacities_of(12, 4, 1, seed)
    stock = stock_of(capacities, list(capacities.nodes))
    yard, flow = Yard(stock.counts, stock.rates), 900.0
    segments = Segments(yard, flow)
    ends = [(None, None), *widths(flow, 400.0)]
    assert len(ends) > 3
    for (_, entry), (leave, _) in itertools.product(ends, ends):
        parts = segments.parts(entry, leave)
        assert sum(part.num_layers for part in parts) == segments.longest(entry, leave)
        for part, width in ((parts[0], entry), (parts[-1], leave)):
            if width is not None:
                assert part.is_crossing
                assert sum(part.counts) >= width.num_nodes
        used = np.sum([part.counts for part in parts], axis=0)
        assert (used <= yard.counts).all()


def test_a_crossing_is_as_wide_as_its_flow_needs() -> None:
    found = widths(1000.0, 300.0)
    assert [(send.num_nodes, receive.num_nodes) for send, receive in found] == [(1, 4), (2, 2), (4, 1)]
    assert all(send.num_nodes * send.tokens_per_s >= 1000 for send, _ in found)
    assert widths(1000.0, 0.0) == []


def test_regions_are_parted_into_the_sets_that_carry_most() -> None:
    a, b, c = "abc"
    planned = {frozenset(s): flow for s, flow in [((a,), 3.0), ((b,), 2.0), ((a, b), 4.0), ((b, c), 5.0)]}
    planned[frozenset((a, b, c))] = 7.5
    assert set(best_parting(frozenset("abc"), planned)) == {frozenset("a"), frozenset("bc")}
    assert best_parting(frozenset("c"), planned) == ()
