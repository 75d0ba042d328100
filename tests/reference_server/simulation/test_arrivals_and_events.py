"""When requests come, and what happens to a cluster meanwhile."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from helixbench.reference_server.run_log import RunLog
from helixbench.reference_server.simulation import Arrivals, SimulationConfig, simulate
from helixbench.solver.problem.arrivals import draw_times
from helixbench.solver.scheduling.work import Routing
from helixbench.solver.simulation.event_loop import ARRIVAL, FAULT, EventLoop
from helixbench.solver.simulation.events import Event, LinkChanges, NodeJoins, NodeSlows
from tests.reference_server.simulation.cases import (
    MIXED,
    OFFLINE,
    WORKLOAD,
    closed,
    cluster,
    four_nodes,
    plan_of,
    two_in_a_row,
)


def gaps(burstiness: float) -> list[float]:
    arrivals = Arrivals(kind="gamma", rate_per_s=4.0, burstiness=burstiness)
    times = list(itertools.islice(draw_times(arrivals, random.Random(5)), 20_000))
    return [b - a for a, b in itertools.pairwise(times)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_of_their_distribution(burstiness: float) -> None:
    drawn = gaps(burstiness)
    assert statistics.fmean(drawn) == pytest.approx(1 / 4, rel=0.05)
    assert statistics.stdev(drawn) / statistics.fmean(drawn) == pytest.approx(burstiness**-0.5, rel=0.05)


@pytest.mark.parametrize("fields", [{"kind": "poisson"}, {"kind": "offline", "rate_per_s": 1.0}])
def test_a_rate_goes_with_random_arrivals_only(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="rate_per_s"):
        Arrivals(**fields)  # type: ignore[arg-type]


def test_a_light_load_is_served_as_it_comes() -> None:
    profile, plan = two_in_a_row()
    config = SimulationConfig(
        workload=WORKLOAD, arrivals=Arrivals(kind="poisson", rate_per_s=2.0), duration_s=200.0, warmup_s=5.0
    )
    run = simulate(plan, profile, config).run
    served_per_s = len(run.requests_in_window()) / run.window.seconds
    alone = simulate(plan, profile, closed(1)).run.latency_percentiles("ttft", (50,))
    loaded = run.latency_percentiles("ttft", (50,))
    assert served_per_s == pytest.approx(2.0, rel=0.1)
    assert alone is not None
    assert loaded is not None
    assert loaded[0] == pytest.approx(alone[0], rel=0.05)


def test_bursts_make_requests_wait_longer_than_an_even_stream() -> None:
    profile, plan = two_in_a_row()
    tails = []
    for burstiness in (0.1, 5.0):
        arrivals = Arrivals(kind="gamma", rate_per_s=20.0, burstiness=burstiness)
        config = SimulationConfig(workload=WORKLOAD, arrivals=arrivals, duration_s=60.0, warmup_s=5.0)
        percentiles = simulate(plan, profile, config).run.latency_percentiles("ttft", (99,))
        assert percentiles is not None
        tails.append(percentiles[0])
    assert tails[0] > 1.5 * tails[1]


def run_with(events: tuple[Event, ...] = (), routing: Routing = "iwrr") -> RunLog:
    profile, plan = two_in_a_row()
    config = SimulationConfig(
        workload=WORKLOAD,
        arrivals=OFFLINE,
        concurrency=16,
        duration_s=8.0,
        warmup_s=2.0,
        events=events,
        routing=routing,
    )
    return simulate(plan, profile, config).run


def test_a_slow_node_slows_the_run_from_then_on_and_until_it_is_healthy_again() -> None:
    healthy = run_with()
    slow = run_with((NodeSlows(at_s=1.0, node="b", factor=3.0),))
    healed = run_with((NodeSlows(at_s=0.5, node="b", factor=3.0), NodeSlows(at_s=1.0, node="b", factor=1.0)))
    iteration_s = [r.nodes["b"].busy_s / r.nodes["b"].iterations for r in (healthy, slow)]
    assert slow.total_tokens_per_s < 0.6 * healthy.total_tokens_per_s
    assert iteration_s[1] == pytest.approx(3 * iteration_s[0], rel=0.25)
    assert healed.total_tokens_per_s == pytest.approx(healthy.total_tokens_per_s, rel=0.05)
    assert "1 s: slow b x 3" in slow.testbed


def test_a_link_that_loses_bandwidth_bounds_the_run() -> None:
    run = run_with((LinkChanges(at_s=1.0, src="a", dst="b", factor=0.1),))
    carried = next(link for link in run.links if (link.src, link.dst) == ("a", "b"))
    assert carried.payload_bytes / run.window.seconds == pytest.approx(0.1 * 1e7, rel=0.1)


def test_a_node_that_joins_is_not_used_and_the_record_says_so() -> None:
    profile = cluster({"a": 2.0, "b": 1.0, "spare": 5.0})
    plan = plan_of(profile, {"a": (0, 5), "b": (5, 8)}, [(["a", "b"], 100.0)])
    config = SimulationConfig(
        workload=WORKLOAD,
        arrivals=OFFLINE,
        concurrency=8,
        duration_s=2.0,
        warmup_s=1.0,
        events=(NodeJoins(at_s=0.5, node="spare"),),
    )
    run = simulate(plan, profile, config).run
    assert set(run.nodes) == {"a", "b"}
    assert "0.5 s: spare joins; the plan does not use it" in run.testbed


def test_ties_go_by_priority_and_then_by_order() -> None:
    kernel, happened = EventLoop(), list[str]()
    kernel.at(1.0, ARRIVAL, happened.append, "second arrival")
    kernel.at(1.0, FAULT, happened.append, "fault")
    kernel.at(0.5, ARRIVAL, happened.append, "first")
    kernel.at(1.0, ARRIVAL, happened.append, "third arrival")
    assert not kernel.run(99)
    assert happened == ["first", "fault", "second arrival", "third arrival"]
    assert (kernel.now_s, kernel.num_events) == (1.0, 4)


@pytest.mark.parametrize("routing", ["iwrr", "fixed", "random", "shortest-queue", "swarm"])
def test_every_routing_serves_and_its_record_lists_what_it_took(routing: Routing) -> None:
    profile, plan = four_nodes()
    run = simulate(plan, profile, closed(12, workload=MIXED, num_requests=80, routing=routing)).run
    taken = {run.pipelines[request.pipeline] for request in run.requests}
    assert run.routing == routing
    if routing == "fixed":
        nodes = [node for pipeline in taken for node, _, _ in pipeline]
        assert len(nodes) == len(set(nodes))
    elif routing != "iwrr":
        assert len(taken) > 3  # more than the plan's own pipelines
    assert sum(len(r.requests_in_window()) for r in (run,)) >= 80
