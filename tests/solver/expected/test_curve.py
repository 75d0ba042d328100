"""Expected throughput over the requests in flight: simulated at each point, never falling, with its interval."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from helixbench.profiler.cluster import ClusterProfile, DefaultLink
from helixbench.solver.expected.analytic import kv_requests
from helixbench.solver.expected.curve import _rising, expected_curve
from helixbench.solver.expected.simulated import NO_LIMITS, Budget, Effort, simulated
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.flow.pipelines import pipelines_of
from helixbench.solver.placement.baselines import METHODS
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Expected, LayerRange
from tests.solver.clusters import WORKLOAD, cost_node, demo_cluster, model, trace

CHAIN = {"big": LayerRange(0, 10), "mid": LayerRange(10, 16)}


def narrow_cluster() -> ClusterProfile:
    """Two fast nodes with little room for KV cache beside slow ones with much, as the baselines place them."""
    kinds = {"fast": (4.0, 7.2e6, 6), "slow": (0.5, 9e6, 3)}
    nodes = tuple(
        cost_node(f"{kind}-{number}", speed=speed, memory_bytes=memory, max_layers=most)
        for kind, (speed, memory, most) in kinds.items()
        for number in range(4)
    )
    return ClusterProfile(model=model(16), nodes=nodes, default_link=DefaultLink(1e8, 1e-4))


def point(concurrency: int, total: float) -> Expected:
    return Expected(
        concurrency=concurrency,
        total_tokens_per_s=total,
        output_tokens_per_s=total / 3,
        low_total_tokens_per_s=0.9 * total,
        high_total_tokens_per_s=1.1 * total,
    )


@pytest.mark.parametrize("workload", [WORKLOAD, trace(3)], ids=["fixed", "trace"])
def test_every_point_is_simulated_and_none_is_below_an_earlier_one(workload) -> None:  # type: ignore[no-untyped-def]
    capacities = Capacities(demo_cluster(), workload, concurrency=48)
    flow = max_flow(capacities, CHAIN, spread=True)
    points, _ = expected_curve(capacities, CHAIN, flow, NO_LIMITS, Budget(1_000_000))
    assert [one.concurrency for one in points][:3] == [1, 2, 4]
    assert points[-1].concurrency == 48
    for one in points:
        assert one.node_batch_tokens, "the analytical estimate has no batches"
        assert one.low_total_tokens_per_s is not None
        assert one.high_total_tokens_per_s is not None
        assert one.low_total_tokens_per_s < one.total_tokens_per_s < one.high_total_tokens_per_s
    for before, after in itertools.pairwise(points):
        assert before.total_tokens_per_s <= after.total_tokens_per_s


def test_the_curve_ends_where_caches_admit_no_more() -> None:
    """240 asked for, few admitted: no point between that claims more."""
    capacities = Capacities(narrow_cluster(), WORKLOAD, concurrency=240)
    placement = METHODS["petals"](capacities)
    assert placement is not None
    flow = max_flow(capacities, placement, spread=True)
    held = flow.used(placement)
    points, _ = expected_curve(capacities, held, flow, NO_LIMITS, Budget(2_000_000))
    admitted = points[-1].in_flight or 0.0
    assert admitted < 120
    assert all(one.concurrency < admitted for one in points[:-1])


@pytest.mark.parametrize("method", ["petals", "swarm"])
def test_as_many_are_admitted_as_the_estimate_says(method: str) -> None:
    capacities = Capacities(narrow_cluster(), WORKLOAD)
    placement = METHODS[method](capacities)
    assert placement is not None
    flow = max_flow(capacities, placement, spread=True)
    held = flow.used(placement)
    weighted = pipelines_of(held, flow.links)
    found = simulated(capacities, held, flow, None, effort=Effort(max_work=400_000))
    assert found is not None
    estimated = kv_requests(capacities, held, weighted)
    assert found.expected.in_flight == pytest.approx(estimated, abs=len(weighted) + 1)


def test_a_point_above_a_later_one_is_lowered_and_said_where_it_is_no_chance() -> None:
    notes: list[str] = []
    rising = _rising([point(1, 10.0), point(2, 101.0), point(4, 100.0)], notes)
    assert [one.total_tokens_per_s for one in rising] == [10.0, 100.0, 100.0]
    assert not notes
    rising = _rising([point(1, 10.0), point(2, 120.0), point(4, 100.0)], notes)
    assert rising[1].total_tokens_per_s == 100.0
    assert rising[1].high_total_tokens_per_s == pytest.approx(132.0)
    assert "with 2 in flight 120 tokens/s were simulated, more than with 4" in notes[0]


def test_what_was_simulated_first_stands_where_no_work_is_left() -> None:
    capacities = Capacities(demo_cluster(), WORKLOAD, concurrency=8)
    flow = max_flow(capacities, CHAIN, spread=True)
    first = msgspec.structs.replace(point(8, 50.0), in_flight=8.0)
    points, notes = expected_curve(capacities, CHAIN, flow, NO_LIMITS, Budget(0), at_first=first)
    assert points == (first,)
    assert "had not settled" in notes[0]
