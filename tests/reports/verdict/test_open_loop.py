"""What a plan promises for arrivals of an open loop."""

from __future__ import annotations

import msgspec
import pytest

from helixbench.reference_server.run_log import LatencyLimits, RequestRecord, RunLog
from helixbench.reference_server.simulation import Arrivals, SimulationConfig, simulate
from helixbench.reference_server.simulation.promise import promise
from helixbench.reports.gate.cases import ExitCode, Status, exit_code_of, run_cases
from helixbench.reports.verdict.validate import validate
from helixbench.reports.verdict.verdict import Outcome
from helixbench.solver import Plan, SolveConfig, solve_placement
from helixbench.solver.problem.workload import Workload
from tests.solver.clusters import demo_cluster

WORKLOAD = Workload(source="mixed", lengths=((40, 12), (90, 8), (17, 25)))
CONFIG = SimulationConfig(
    workload=WORKLOAD,
    arrivals=Arrivals(kind="gamma", rate_per_s=2.0, burstiness=0.5),
    num_requests=200,
    duration_s=None,
    warmup_s=0.0,
    limits=LatencyLimits(max_ttft_s=30.0),
)


@pytest.fixture(scope="module")
def plan() -> Plan:
    cluster = demo_cluster()
    solved = solve_placement(SolveConfig(cluster=cluster, workload=WORKLOAD, concurrency=8, time_limit_s=2))
    assert isinstance(solved, Plan)
    return msgspec.structs.replace(solved, cluster=cluster)


@pytest.fixture(scope="module")
def run(plan: Plan) -> RunLog:
    """As if it had been measured: the simulation of the same requests, and what was promised for them."""
    assert plan.cluster is not None
    simulated = simulate(plan, plan.cluster, CONFIG).run
    return msgspec.structs.replace(simulated, simulated=False, promised=promise(plan, CONFIG))


def slower(run: RunLog, factor: float) -> RunLog:
    """The run with every first token so much later, counted from its arrival."""

    def later(request: RequestRecord) -> RequestRecord:
        first_s = request.arrival_s + factor * (request.first_token_s - request.arrival_s)
        return msgspec.structs.replace(
            request, first_token_s=first_s, finish_s=max(request.finish_s, first_s), admitted_s=request.arrival_s
        )

    return msgspec.structs.replace(run, requests=tuple(map(later, run.requests)))


def test_a_promise_has_the_percentiles_of_the_simulation(run: RunLog) -> None:
    assert run.promised is not None
    for kind, promised in (("ttft", run.promised.ttft), ("tpot", run.promised.tpot)):
        assert promised is not None
        assert msgspec.structs.astuple(promised) == run.latency_percentiles(kind, (50.0, 90.0, 99.0))  # type: ignore[arg-type]
        assert 0 < promised.p50_s <= promised.p90_s <= promised.p99_s
    assert run.promised.total_tokens_per_s == run.total_tokens_per_s
    assert run.promised.goodput_per_s == run.goodput_per_s


def test_a_plan_without_its_cluster_promises_nothing(plan: Plan) -> None:
    assert promise(msgspec.structs.replace(plan, cluster=None), CONFIG) is None


@pytest.mark.parametrize(("simulated", "why"), [(False, "does not hold the profile"), (True, "itself the prediction")])
def test_without_a_promise_nothing_is_decided(run: RunLog, simulated: bool, why: str) -> None:
    verdict = validate(msgspec.structs.replace(run, promised=None, simulated=simulated))
    assert verdict.outcome is Outcome.NOT_MEASURED
    assert why in verdict.statement


def test_the_gate_decides_on_throughput_and_on_each_percentile_that_is_settled(run: RunLog) -> None:
    verdict = validate(run)
    assert verdict.outcome is Outcome.AS_PREDICTED, verdict.statement
    cases = {case.name: case.status for case in run_cases(verdict)}
    assert exit_code_of(run_cases(verdict)) is ExitCode.PASS
    assert cases["measured / expected with arrivals: gamma, 2 requests/s, burstiness 0.5"] is Status.PASSED
    assert {name for name in cases if "promised" in name} == {
        f"{kind} {percent} measured / promised" for kind in ("TTFT", "TPOT") for percent in ("p50", "p90")
    }, "200 requests settle p90 and not p99"


def test_a_percentile_above_what_was_promised_fails_the_gate(run: RunLog) -> None:
    verdict = validate(slower(run, 1.4))
    assert verdict.outcome is Outcome.BELOW_EXPECTED
    assert "TTFT p50 is 1.400 x promised" in verdict.statement
    failed = [case.name for case in run_cases(verdict) if case.status is Status.FAILED]
    assert {"TTFT p50 measured / promised", "TTFT p90 measured / promised"} <= set(failed)


def test_goodput_counts_requests_within_both_limits(run: RunLog) -> None:
    def good(**limits: float) -> int:
        limited = msgspec.structs.replace(run, limits=LatencyLimits(**limits))
        assert limited.goodput_per_s is not None
        return round(limited.goodput_per_s * run.window.seconds)

    ttft, tpot = run.latency_percentiles("ttft", (50.0,)), run.latency_percentiles("tpot", (50.0,))
    assert ttft is not None
    assert tpot is not None
    by_hand = [(run.ttft_s(r) <= ttft[0], r.tpot_s is None or r.tpot_s <= tpot[0]) for r in run.requests_in_window()]
    assert good(max_ttft_s=ttft[0]) == sum(first for first, _ in by_hand)
    assert good(max_tpot_s=tpot[0]) == sum(each for _, each in by_hand)
    assert good(max_ttft_s=ttft[0], max_tpot_s=tpot[0]) == sum(map(all, by_hand))
    assert 0 < sum(map(all, by_hand)) < len(by_hand)
