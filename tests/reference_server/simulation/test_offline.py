"""Offline runs: what a request waits for, and which promise they are held against."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from helixbench.records import load_record, save_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reference_server.simulation import SimulationConfig, simulate
from helixbench.reports.verdict.run_metrics import ttfts
from helixbench.reports.verdict.validate import expected_at, validate
from helixbench.solver.problem.plan import Expected
from tests.reference_server.simulation.cases import OFFLINE, WORKLOAD, four_nodes

PROMISE = Expected(
    concurrency=1000, total_tokens_per_s=100.0, output_tokens_per_s=25.0, in_flight=1000.0, node_busy={},
    node_batch_tokens={},
)  # fmt: skip


def run_of(**changes: Any) -> RunLog:
    profile, plan = four_nodes(memory_bytes=8e6)
    plan = msgspec.structs.replace(plan, predicted=msgspec.structs.replace(plan.predicted, expected=(PROMISE,)))
    made = SimulationConfig(workload=WORKLOAD, arrivals=OFFLINE, duration_s=2.0, warmup_s=1.0)
    return simulate(plan, profile, msgspec.structs.replace(made, **changes)).run


def test_time_to_first_token_is_from_admission() -> None:
    run = run_of()
    inside = run.requests_in_window()
    assert min(r.arrival_s for r in inside) == 0.0
    waits = [r.first_token_s - r.admitted_s for r in inside if r.admitted_s is not None]
    assert len(waits) == len(inside)
    longest = run.latency_percentiles("ttft", (100,))
    assert longest is not None
    assert longest[0] == pytest.approx(max(waits))
    assert longest[0] < run.window.start_s, "not the time since the run began"
    assert sorted(ttfts(run)) == pytest.approx(sorted(waits))
    latency = next(latency for latency in validate(run).latencies if latency.kind == "ttft")
    assert latency.mean_s == pytest.approx(sum(waits) / len(waits))


@pytest.mark.parametrize("limit", [{"concurrency": 4}, {"kv_share": 0.5}, {"num_requests": 60, "warmup_s": 0.0}])
def test_a_limited_run_is_not_held_against_full_caches(limit: dict[str, Any], tmp_path: Any) -> None:
    assert expected_at(run_of()) == PROMISE
    assert expected_at(run_of(kv_share=1.0)) == PROMISE, "what the plan fills"
    run = run_of(**limit)
    save_record(tmp_path / "run.json", run)
    verdict = validate(load_record(tmp_path / "run.json", RunLog))
    assert verdict.outcome == "could not measure"
    assert "no prediction for concurrency" in verdict.statement
