"""Simulated times against sums that can be done on paper, and against what the solver expects."""

from __future__ import annotations

import msgspec
import pytest

from helixbench.profiler.cluster import ClusterProfile, Coordinator, Link
from helixbench.profiler.cost.model import BatchShape, StageCost
from helixbench.reference_server.simulation import SimulationConfig, simulate
from helixbench.solver import SolveConfig, solve_placement
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Plan
from helixbench.solver.problem.workload import Workload, fixed_workload
from helixbench.solver.questions.generate import make_cluster
from helixbench.solver.scheduling.work import Routing
from helixbench.solver.simulation.closed_loop import simulate_closed_loop
from helixbench.solver.simulation.stage_time import StageTimer
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

EXACT = 1e-9


def stage_s(profile: ClusterProfile, node: str, layers: int, batch: BatchShape, *, first: bool, last: bool) -> float:
    cost = profile.node(node).cost
    assert cost is not None
    return cost.stage.time_s(num_layers=layers, batch=batch, first=first, last=last)


def test_one_request_takes_the_sum_of_its_parts() -> None:
    """Two nodes in a row, a prompt of 3 tokens, 2 output tokens: every term of both by hand."""
    profile = cluster({"a": 2.0, "b": 1.0})
    plan = plan_of(profile, {"a": (0, 5), "b": (5, 8)}, [(["a", "b"], 1.0)])
    workload = fixed_workload(prompt_tokens=3, output_tokens=2)

    run = simulate(plan, profile, closed(1, workload=workload, num_requests=1)).run

    latency_s, bandwidth, token_bytes, activation_bytes = 1e-3, 1e7, 2.0, 1000.0
    prompt = BatchShape(prefill_tokens=3, prefill_chunks=1, prefill_pairs=1 + 2 + 3, sampled_tokens=1)
    decode = BatchShape(decode_tokens=1, decode_context_tokens=4, sampled_tokens=1)
    back_s = latency_s + token_bytes / bandwidth + 1e-4 + 2e-5  # to the coordinator, a message with one token
    ttft_s = (
        latency_s + 3 * token_bytes / bandwidth
        + stage_s(profile, "a", 5, prompt, first=True, last=False)
        + latency_s + 3 * activation_bytes / bandwidth
        + stage_s(profile, "b", 3, prompt, first=False, last=True)
        + back_s
    )  # fmt: skip
    tpot_s = (
        latency_s + token_bytes / bandwidth
        + stage_s(profile, "a", 5, decode, first=True, last=False)
        + latency_s + activation_bytes / bandwidth
        + stage_s(profile, "b", 3, decode, first=False, last=True)
        + back_s + 3e-5  # a request that ends
    )  # fmt: skip
    first = run.requests[0]
    assert run.ttft_s(first) == pytest.approx(ttft_s, rel=EXACT)
    assert first.tpot_s == pytest.approx(tpot_s, rel=EXACT)


def test_prompts_longer_than_a_batch_are_cut_as_the_server_cuts_them() -> None:
    profile = cluster({"a": 1.0})
    plan = plan_of(profile, {"a": (0, 8)}, [(["a"], 1.0)])
    assert plan.nodes["a"].max_batch_tokens == 64

    run = simulate(plan, profile, closed(1, workload=fixed_workload(prompt_tokens=100, output_tokens=1))).run

    assert run.nodes["a"].iterations == 2 * 60
    assert run.nodes["a"].prefill_tokens == 100 * 60


@pytest.mark.parametrize("concurrency", [3, 48])
@pytest.mark.parametrize("workload", [WORKLOAD, MIXED], ids=["fixed", "mixed"])
@pytest.mark.parametrize("case", ["one node", "two in a row"])
def test_a_closed_loop_on_one_pipeline_is_what_the_solver_expects(
    case: str, workload: Workload, concurrency: int
) -> None:
    """Both run one simulated cluster; requests, windows and counters each has its own."""
    profile, plan = two_in_a_row()
    if case == "one node":  # near enough for it to wait for its batch (it gives up waiting where that is in vain)
        profile = cluster({"a": 1.0}, latency_s=1e-4)
        plan = plan_of(profile, {"a": (0, 8)}, [(["a"], 1.0)])
    profile = with_batches_of(profile, 64)

    promised = simulate_closed_loop(Capacities(profile, workload), plan.placement, plan.flows, concurrency)
    assert promised is not None
    run = simulate(plan, profile, closed(concurrency, workload=workload, num_requests=max(4 * concurrency, 96))).run

    assert run.output_tokens_per_s == pytest.approx(promised.expected.output_tokens_per_s, rel=1e-3)
    per_output = (workload.mean_prompt_tokens + workload.mean_output_tokens) / workload.mean_output_tokens
    assert promised.expected.total_tokens_per_s == pytest.approx(per_output * promised.expected.output_tokens_per_s)


def test_simulated_and_expected_agree_on_late_entries_shared_nics_and_limits() -> None:
    """Four nodes, three pipelines, one with a late entry."""
    profile, plan = four_nodes(memory_bytes=2.2e7)
    plan = msgspec.structs.replace(plan, max_decode_batch=5)

    promised = simulate_closed_loop(
        Capacities(profile, MIXED), plan.placement, plan.flows, 40, max_decode_batch=5, max_batch_tokens=64
    )
    assert promised is not None
    run = simulate(plan, profile, closed(40, workload=MIXED, num_requests=160)).run

    assert run.output_tokens_per_s == pytest.approx(promised.expected.output_tokens_per_s, rel=1e-2)
    for node, busy in promised.expected.node_busy.items():
        assert run.nodes[node].busy_s / run.window.seconds == pytest.approx(busy, rel=3e-2)


def test_simulated_and_expected_agree_on_capacity_tables() -> None:
    profile = make_cluster(num_nodes=10, num_types=2, num_regions=1, seed=1)
    plan = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, method="petals", concurrency=48))
    assert isinstance(plan, Plan)

    run = simulate(plan, profile, closed(48, num_requests=192)).run

    promised = simulate_closed_loop(Capacities(profile, WORKLOAD), plan.placement, plan.flows, 48)
    assert promised is not None
    assert run.output_tokens_per_s == pytest.approx(promised.expected.output_tokens_per_s, rel=1e-2)
    assert plan.predicted.expected[-1].total_tokens_per_s == pytest.approx(run.total_tokens_per_s, rel=5e-2)


def with_batches_of(profile: ClusterProfile, max_batch_tokens: int) -> ClusterProfile:
    nodes = []
    for node in profile.nodes:
        assert node.cost is not None
        cost = msgspec.structs.replace(node.cost, max_batch_tokens=max_batch_tokens)
        nodes.append(msgspec.structs.replace(node, cost=cost))
    return msgspec.structs.replace(profile, nodes=tuple(nodes))


def test_a_batch_with_late_entries_takes_what_its_layers_take() -> None:
    """Layer by layer: those before the late entry hold only the early ones."""
    profile, _ = four_nodes()
    cost = profile.nodes[0].cost
    assert cost is not None
    timer = StageTimer(cost.stage, LayerRange(2, 8), num_layers=8)

    seconds = timer.seconds({2: (5, 1, 15, 1, 8, 2), 6: (0, 0, 0, 1, 4, 1)})

    alone = BatchShape(5, 1, 15, 1, 8, 2)
    both = BatchShape(5, 1, 15, 2, 8 + 4, 3)
    expected_s = 4 * cost.stage.scope_s("layer", alone) + cost.stage.time_s(
        num_layers=2, batch=both, first=False, last=True
    )
    assert seconds == pytest.approx(expected_s, rel=EXACT)


def test_messages_share_a_card_and_a_slow_link_keeps_none_from_others() -> None:
    """Offline, many prompts at once into b over a slow link from a1 and a fast one from a2: a2 does not wait for a1."""
    links = [Link(src="a1", dst="b", bandwidth_bytes_per_s=1e4, latency_s=1e-3)]
    profile = cluster({"a1": 1.0, "a2": 1.0, "b": 1.0}, links=links)
    plan = plan_of(profile, {"a1": (0, 4), "a2": (0, 4), "b": (4, 8)}, [(["a1", "b"], 1.0), (["a2", "b"], 1.0)])

    run = simulate(plan, profile, offline(num_requests=16)).run

    first_tokens = {index: [r.first_token_s for r in run.requests if r.pipeline == index] for index in (0, 1)}
    by_node = {run.pipelines[index][0][0]: times for index, times in first_tokens.items()}
    seconds_on_the_slow_link = 8 * WORKLOAD.lengths[0][0] * 1000.0 / 1e4
    assert max(by_node["a1"]) > seconds_on_the_slow_link
    assert max(by_node["a2"]) < seconds_on_the_slow_link / 20


def offline(*, num_requests: int) -> SimulationConfig:
    return SimulationConfig(
        workload=WORKLOAD, arrivals=OFFLINE, num_requests=num_requests, duration_s=None, warmup_s=0.0
    )


def test_the_coordinator_takes_its_time() -> None:
    """With a second a message, one node and one request in flight, no token comes sooner than a second apart."""
    profile = cluster({"a": 5.0}, coordinator=Coordinator(message_s=1.0, token_s=0.0, request_s=0.0))
    plan: Plan = plan_of(profile, {"a": (0, 8)}, [(["a"], 1.0)])
    run = simulate(plan, profile, closed(1, num_requests=3)).run
    tpots = [request.tpot_s for request in run.requests]
    assert min(tpot for tpot in tpots if tpot is not None) > 1.0


@pytest.mark.parametrize("routing", ["iwrr", "swarm"])
def test_zero_seconds_are_allowed(routing: Routing) -> None:
    """A cost of nothing is a legal cost; time then passes on links only."""
    stage = StageCost.with_zeros(max_tokens=64.0, max_context_tokens=64.0)
    profile, plan = two_in_a_row()
    nodes = tuple(
        msgspec.structs.replace(n, cost=msgspec.structs.replace(n.cost, stage=stage))  # type: ignore[type-var]
        for n in profile.nodes
    )
    run = simulate(plan, msgspec.structs.replace(profile, nodes=nodes), closed(2, routing=routing)).run
    assert run.output_tokens > 0
