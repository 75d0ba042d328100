"""What goes in comes out, once; and the checks that say so do catch what breaks it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixbench.reference_server.simulation import Arrivals, SimulationConfig, simulate
from helixbench.reports.verdict.integrity import check_run
from helixbench.solver.problem.workload import Workload
from helixbench.solver.scheduling.batcher import Batcher
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.requests import DecodeGroup, InFlight
from helixbench.solver.scheduling.work import Routing
from helixbench.solver.simulation.cluster import SimulatedCluster
from tests.reference_server.simulation.cases import OFFLINE, closed, cluster, four_nodes, plan_of, two_in_a_row
from tests.solver.simulation.ledger import CheckedBatcher, CheckedCoordinator, ConservationError


@pytest.fixture(autouse=True, scope="module")
def checked() -> Iterator[None]:
    """Every simulation of this file is checked as it goes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helixbench.solver.simulation.cluster.Batcher", CheckedBatcher)
        patch.setattr("helixbench.solver.simulation.cluster.Coordinator", CheckedCoordinator)
        yield


ROUTINGS: tuple[Routing, ...] = ("iwrr", "fixed", "random", "shortest-queue", "swarm")
LENGTHS = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 30)), min_size=1, max_size=4)
ARRIVALS = st.one_of(
    st.just(OFFLINE),
    st.builds(Arrivals, kind=st.just("gamma"), rate_per_s=st.floats(5, 500), burstiness=st.floats(0.2, 3)),
)


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS,
    arrivals=ARRIVALS,
    routing=st.sampled_from(ROUTINGS),
    seed=st.integers(0, 99),
    kv_tokens=st.integers(121, 600),
    num_requests=st.integers(1, 40),
)
def test_every_request_is_served_once_and_leaves_nothing_behind(
    lengths: list[tuple[int, int]],
    arrivals: Arrivals,
    routing: Routing,
    seed: int,
    kv_tokens: int,
    num_requests: int,
) -> None:
    """Little KV cache, so that requests wait to be let in."""
    workload = Workload(source="drawn", lengths=tuple(lengths))
    profile, plan = four_nodes()
    share = kv_tokens / min(node.kv_capacity_tokens or 0 for node in plan.nodes.values())

    run = simulate(
        plan,
        profile,
        SimulationConfig(
            workload=workload,
            arrivals=arrivals,
            routing=routing,
            seed=seed,
            num_requests=num_requests,
            duration_s=None,
            warmup_s=0.0,
            kv_share=share,
        ),
    ).run

    assert len(run.requests) == num_requests
    prompts, outputs = (sum(getattr(r, f) for r in run.requests) for f in ("prompt_tokens", "output_tokens"))
    assert (run.prompt_tokens, run.output_tokens) == (prompts, outputs)
    for name, node in run.nodes.items():
        passing = [r for r in run.requests if any(hop[0] == name for hop in run.pipelines[r.pipeline])]
        assert node.prefill_tokens == sum(r.prompt_tokens for r in passing)
        assert node.decode_tokens == sum(r.output_tokens - 1 for r in passing)
        assert node.kv_peak_tokens <= share * node.kv_capacity_tokens
    assert all(check.is_passed for check in check_run(run)), [c for c in check_run(run) if not c.is_passed]


@given(concurrency=st.integers(1, 20), routing=st.sampled_from(ROUTINGS), seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_a_closed_loop_keeps_its_number_in_flight(concurrency: int, routing: Routing, seed: int) -> None:
    profile, plan = four_nodes()
    run = simulate(plan, profile, closed(concurrency, num_requests=40, routing=routing, seed=seed)).run
    assert len(run.requests_in_window()) >= 40
    assert all(check.is_passed for check in check_run(run)), [c for c in check_run(run) if not c.is_passed]


def test_a_token_that_runs_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Batcher.next_batch

    def twice(self: Batcher[Any]) -> Any:
        decodes, chunks = original(self)
        return decodes, [*chunks, *chunks[:1]]

    monkeypatch.setattr(Batcher, "next_batch", twice)
    profile, plan = two_in_a_row()
    with pytest.raises(ConservationError, match="runs a token twice, or skips one"):
        simulate(plan, profile, closed(2))


def test_a_token_that_is_lost_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Batcher.add_decodes
    added = 0

    def lossy(self: Batcher[Any], decodes: Any) -> None:
        nonlocal added
        added += 1
        if added != 50:
            original(self, decodes)

    monkeypatch.setattr(Batcher, "add_decodes", lossy)
    profile, plan = two_in_a_row()
    with pytest.raises(AssertionError, match="nothing happens any more with 1 in flight"):
        simulate(plan, profile, closed(1))


def test_kv_slots_that_the_coordinator_does_not_free_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Coordinator._release

    def forgetful(self: Coordinator, state: InFlight) -> None:
        original(self, state)
        if state.request.number == 3:
            self._free["a"] -= 7

    monkeypatch.setattr(Coordinator, "_release", forgetful)
    profile, plan = two_in_a_row()
    with pytest.raises(ConservationError, match=r"hold \{'a': 0, .* KV slots; the coordinator has \{'a': 7, "):
        simulate(
            plan,
            profile,
            SimulationConfig(
                workload=plan.assumptions.workload, arrivals=OFFLINE, num_requests=4, duration_s=None, warmup_s=0.0
            ),
        )


def test_a_token_for_a_request_that_has_ended_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SimulatedCluster._receive
    kept: list[DecodeGroup] = []

    def echoing(self: SimulatedCluster, message: Any) -> None:
        kept.extend(DecodeGroup(g.pipeline, list(g.members), g.context_tokens) for g in message)
        if len(kept) == 20:
            message = [*message, kept[0]]
        original(self, message)

    monkeypatch.setattr(SimulatedCluster, "_receive", echoing)
    profile, plan = two_in_a_row()
    with pytest.raises(ConservationError, match="request 0 got a token that it did not ask for"):
        simulate(plan, profile, closed(1))


def test_admission_waits_for_room_and_says_when_it_let_in() -> None:
    """Room for two at a time: of four that are there from the start two wait."""
    profile = cluster({"a": 1.0})
    plan = plan_of(profile, {"a": (0, 8)}, [(["a"], 1.0)])
    held = plan.nodes["a"].kv_capacity_tokens or 0
    config = SimulationConfig(
        workload=plan.assumptions.workload,
        arrivals=OFFLINE,
        num_requests=4,
        duration_s=None,
        warmup_s=0.0,
        kv_share=2.5 * 51 / held,
    )
    run = simulate(plan, profile, config).run
    admitted = sorted(r.admitted_s or 0.0 for r in run.requests)
    first_end = min(r.finish_s for r in run.requests)
    assert run.concurrency == 2
    assert admitted[:2] == [0.0, 0.0]
    assert admitted[2] >= first_end
    assert [r.arrival_s for r in run.requests] == [0.0] * 4
