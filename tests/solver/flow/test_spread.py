"""The flow that routing follows leaves no cache empty that could hold requests."""

from __future__ import annotations

import pytest

from helixbench.profiler.cluster import ClusterProfile, DefaultLink
from helixbench.profiler.import_tables import with_imported_costs
from helixbench.solver import fixed_workload
from helixbench.solver.expected.analytic import kv_requests
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.flow.pipelines import pipelines_of
from helixbench.solver.flow.spread import cache_shares
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange
from tests.solver.clusters import DATA, cost_node, model, published

WORKLOAD = fixed_workload(prompt_tokens=64, output_tokens=32)


@pytest.mark.parametrize(("larger", "share"), [(1e9, 0.5), (4e9, 0.65)])
def test_of_two_alike_nodes_the_one_with_more_memory_gets_more(larger: float, share: float) -> None:
    """Behind a node that is far slower than both; memory of equal size parts the flow in halves."""
    nodes = (
        cost_node("slow", speed=0.2, memory_bytes=64e9),
        cost_node("small", memory_bytes=1e9),
        cost_node("large", memory_bytes=larger),
    )
    profile = ClusterProfile(
        model=model(4, kv_bytes_per_token_per_layer=1e5), nodes=nodes, default_link=DefaultLink(1e9, 1e-4)
    )
    placement = {"slow": LayerRange(0, 2), "small": LayerRange(2, 4), "large": LayerRange(2, 4)}
    flow = max_flow(Capacities(profile, WORKLOAD, partial=False), placement, spread=True)
    if share == 0.5:
        assert flow.through("large") == pytest.approx(flow.tokens_per_s / 2, rel=0.05)
    else:
        assert flow.through("large") > share * flow.tokens_per_s


def test_few_requests_in_flight_leave_caches_out_of_it() -> None:
    nodes = (cost_node("a", memory_bytes=1e9), cost_node("b", memory_bytes=4e9))
    profile = ClusterProfile(model=model(4), nodes=nodes, default_link=DefaultLink(1e9, 1e-4))
    placement = {"a": LayerRange(0, 4), "b": LayerRange(0, 4)}
    many, few = (cache_shares(Capacities(profile, WORKLOAD, concurrency=n), placement) for n in (None, 4))
    assert min(few.values()) > 100 > max(many.values())


def test_late_entry_does_not_wind_through_two_branches() -> None:
    """Of the published plan of published24 a flow that was only even in time took half the requests in flight."""
    from benchmarks.published_plans import PUBLISHED_MILP

    profile = with_imported_costs(published("published24-llama70b"), DATA / "gpu_profiles")
    workload = fixed_workload(prompt_tokens=763, output_tokens=232)
    ranges = [LayerRange(*map(int, text.split("-"))) for text in PUBLISHED_MILP.split()]
    placement = {node.name: held for node, held in zip(profile.nodes, ranges, strict=True)}
    admitted = []
    for partial in (True, False):
        capacities = Capacities(profile, workload, partial=partial)
        flow = max_flow(capacities, placement, spread=True)
        admitted.append(kv_requests(capacities, placement, pipelines_of(placement, flow.links)))
    assert admitted[0] > 0.75 * admitted[1] > 1
