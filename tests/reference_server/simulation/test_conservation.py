"""What goes in comes out, once; and the checks that say so do catch what breaks it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixbench.reference_server.run_log import RunLog
from helixbench.reference_server.simulation import Arrivals, SimulationConfig, simulate
from helixbench.reference_server.simulation.checks import ConservationError, Ledger
from helixbench.reference_server.simulation.node import Message, SimulatedNode
from helixbench.reports.verdict.integrity import check_run
from helixbench.solver.problem.workload import Workload
from helixbench.solver.scheduling.batcher import Batcher, Chunk
from helixbench.solver.scheduling.coordinator import Coordinator, Request, TokenEvent
from helixbench.solver.scheduling.work import Routing, WorkItem
from tests.reference_server.simulation.cases import OFFLINE, closed, cluster, four_nodes, plan_of, two_in_a_row

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

    def twice(self: Batcher) -> list[Chunk]:
        batch = original(self)
        return [*batch, batch[0]]

    monkeypatch.setattr(Batcher, "next_batch", twice)
    profile, plan = two_in_a_row()
    with pytest.raises(ConservationError, match="runs a token twice, or skips one"):
        simulate(plan, profile, closed(2))


def test_a_token_that_is_lost_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Batcher.add
    added = 0

    def lossy(self: Batcher, item: Any, inputs: Any) -> None:
        nonlocal added
        added += 1
        if added != 50:
            original(self, item, inputs)

    monkeypatch.setattr(Batcher, "add", lossy)
    profile, plan = two_in_a_row()
    with pytest.raises(ConservationError, match="nothing happens any more with 1 in flight"):
        simulate(plan, profile, closed(1))


def four_offline() -> RunLog:
    """Four requests that are there from the start; the run ends with them."""
    profile, plan = two_in_a_row()
    workload = plan.assumptions.workload
    config = SimulationConfig(workload=workload, arrivals=OFFLINE, num_requests=4, duration_s=None, warmup_s=0.0)
    return simulate(plan, profile, config).run


def test_kv_slots_that_a_node_does_not_free_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SimulatedNode._close

    def lossy(self: SimulatedNode, request: int) -> None:
        if (self.name, request) != ("b", 3):
            original(self, request)

    monkeypatch.setattr(SimulatedNode, "_close", lossy)
    with pytest.raises(ConservationError, match="b: 1 requests that have ended hold 51 KV slots"):
        four_offline()


def test_kv_slots_that_the_coordinator_does_not_free_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Coordinator.sampled

    def forgetful(self: Coordinator, tokens: Any) -> Any:
        actions = original(self, tokens)
        if not self.num_in_flight:
            self._free["a"] -= 7
        return actions

    monkeypatch.setattr(Coordinator, "sampled", forgetful)
    with pytest.raises(ConservationError, match="the coordinator holds 7 KV slots of a for requests that have ended"):
        four_offline()


def test_work_that_no_request_waits_for_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SimulatedNode.receive

    def echoing(self: SimulatedNode, message: Message) -> None:
        original(self, message)
        for request in message.closes:
            original(self, Message([WorkItem(request, 51, 1, sample=True, is_decode=True)]))

    monkeypatch.setattr(SimulatedNode, "receive", echoing)
    with pytest.raises(ConservationError, match="a: work is left that no request waits for"):
        four_offline()


def test_the_ledger_knows_every_request_and_token() -> None:
    ledger = Ledger()
    ledger.submitted(Request(number=1, prompt=(0,), max_tokens=2))
    with pytest.raises(ConservationError, match="submitted twice"):
        ledger.submitted(Request(number=1, prompt=(0,), max_tokens=2))
    with pytest.raises(ConservationError, match="with 1 tokens to come"):
        ledger.told(event(1, "length"))
    ledger.told(event(1))
    with pytest.raises(ConservationError, match="1 requests have not ended, but 0"):
        ledger.close([], num_waiting=0, num_in_flight=0)
    ledger.told(event(1, "length"))
    with pytest.raises(ConservationError, match="did not ask for"):
        ledger.told(event(1))
    ledger.close([], num_waiting=0, num_in_flight=0)


def event(request: int, reason: Any = "") -> TokenEvent:
    return TokenEvent(request=request, token=0, pipeline=0, reason=reason)


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
