"""Result files of other clients, beside a run and through its gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helixbench.errors import InputError
from helixbench.records import save_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.gate.cases import Status, run_cases
from helixbench.reports.render.summaries import run_summary
from helixbench.reports.verdict.client import ClientLatency, ClientResult, load_client
from helixbench.reports.verdict.validate import expected_at, validate
from helixbench.reports.verdict.verdict import Outcome
from helixbench.solver.problem.plan import Percentiles
from tests.reports.conftest import Command
from tests.reports.report_examples import CONCURRENCY, example_run

TTFT = ClientLatency(mean_s=0.2, p50_s=0.15, p90_s=0.4, p99_s=0.9)
TPOT = ClientLatency(mean_s=0.05, p50_s=0.04, p90_s=0.06, p99_s=0.08)


def guidellm(result: ClientResult) -> dict[str, Any]:
    def spread(latency: ClientLatency) -> dict[str, Any]:
        stated = {p: 1000 * getattr(latency, f"{p}_s") for p in ("p50", "p90", "p99")}
        return {"successful": {"mean": 1000 * (latency.mean_s or 0.0), "percentiles": stated}}

    metrics = {
        "request_totals": {"successful": result.num_requests, "errored": result.num_failed, "incomplete": 1},
        "prompt_token_count": {"successful": {"total_sum": result.prompt_tokens}},
        "output_token_count": {"successful": {"total_sum": result.output_tokens}},
        "time_to_first_token_ms": spread(result.ttft),
        "inter_token_latency_ms": spread(result.tpot),
        "time_per_output_token_ms": {"successful": {"mean": 1e9}},
    }
    return {"benchmarks": [{"start_time": 100.0, "end_time": 100.0 + result.duration_s, "metrics": metrics}]}


def vllm(result: ClientResult) -> dict[str, Any]:
    stated: dict[str, Any] = {}
    for name, latency in (("ttft", result.ttft), ("tpot", result.tpot)):
        for statistic, value in (("mean", latency.mean_s), ("median", latency.p50_s), ("p99", latency.p99_s)):
            stated[f"{statistic}_{name}_ms"] = 1000 * (value or 0.0)
    return {
        "duration": result.duration_s,
        "completed": result.num_requests,
        "failed": result.num_failed,
        "total_input_tokens": result.prompt_tokens,
        "total_output_tokens": result.output_tokens,
        "request_rate": "inf",
        "max_concurrency": result.concurrency,
        **stated,
    }


def aiperf(result: ClientResult) -> dict[str, Any]:
    def spread(latency: ClientLatency) -> dict[str, Any]:
        stated = {p: 1000 * getattr(latency, f"{p}_s") for p in ("p50", "p90", "p99")}
        return {"unit": "ms", "avg": 1000 * (latency.mean_s or 0.0), **stated}

    return {
        "schema_version": "1.3",
        "request_throughput": {"unit": "requests/sec", "avg": result.num_requests / result.duration_s},
        "request_count": {"unit": "requests", "avg": float(result.num_requests)},
        "error_request_count": {"unit": "requests", "avg": float(result.num_failed)},
        "benchmark_duration": {"unit": "sec", "avg": result.duration_s},
        "input_sequence_length": {"unit": "tokens", "avg": 1.0, "sum": float(result.prompt_tokens)},
        "output_sequence_length": {"unit": "tokens", "avg": result.output_tokens / result.num_requests},
        "time_to_first_token": spread(result.ttft),
        "inter_token_latency": spread(result.tpot),
        "input_config": {"loadgen": {"concurrency": result.concurrency}},
    }


def result(total_tokens_per_s: float, **changes: Any) -> ClientResult:
    tokens = round(100 * total_tokens_per_s)
    made = ClientResult(
        client="aiperf",
        num_requests=200,
        num_failed=0,
        duration_s=100.0,
        prompt_tokens=tokens - tokens // 3,
        output_tokens=tokens // 3 - tokens // 3 % 200,
        ttft=TTFT,
        tpot=TPOT,
        concurrency=CONCURRENCY,
    )
    return msgspec.structs.replace(made, **changes)


def expected_tokens_per_s(run: RunLog) -> float:
    expected = expected_at(run)
    assert expected is not None
    return expected.total_tokens_per_s


def write(folder: Path, tree: object) -> Path:
    (folder / "client.json").write_text(json.dumps(tree))
    return folder / "client.json"


@pytest.mark.parametrize(
    ("write_as", "name", "lacks"),
    [
        (guidellm, "guidellm", {"concurrency"}),
        (vllm, "vllm bench serve", {"p90_s"}),
        (aiperf, "aiperf", set()),
    ],
)
def test_each_client_s_file_is_read(
    tmp_path: Path, write_as: Callable[[ClientResult], Any], name: str, lacks: set[str]
) -> None:
    meant = result(900.0, client=name, num_failed=3)
    if "concurrency" in lacks:
        meant = msgspec.structs.replace(meant, concurrency=None)
    read = load_client(write(tmp_path, write_as(meant)))
    for latency, stated in ((read.ttft, meant.ttft), (read.tpot, meant.tpot)):
        for field in ("mean_s", "p50_s", "p90_s", "p99_s"):
            value = getattr(latency, field)
            assert value is None if field in lacks else value == pytest.approx(getattr(stated, field))
    same = msgspec.structs.replace(read, ttft=meant.ttft, tpot=meant.tpot)
    assert same == msgspec.structs.replace(meant, duration_s=pytest.approx(meant.duration_s))


def test_times_are_those_of_the_emulated_devices(tmp_path: Path) -> None:
    read = load_client(write(tmp_path, aiperf(result(900.0))), time_scale=4.0)
    assert read.duration_s == 25.0
    assert read.ttft.p50_s == pytest.approx(0.15 / 4)
    assert read.total_tokens_per_s == pytest.approx(3600.0, rel=0.01)


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ([], "neither guidellm's `benchmarks`"),
        ({"a": 1}, "neither guidellm's `benchmarks`"),
        ({"benchmarks": []}, "0 benchmarks in it: choose one"),
        ({"benchmarks": [{}, {}]}, "2 benchmarks in it: choose one with --client-benchmark N"),
        ({"benchmarks": [{}]}, r"benchmarks\[0\]: end_time is None: need a number"),
        (vllm(result(9.0)) | {"completed": "many"}, "completed is 'many': need a number"),
        (vllm(result(9.0)) | {"duration": 0}, "200 requests succeeded in 0 s: nothing was measured"),
        (aiperf(result(9.0)) | {"time_to_first_token": {"unit": "h"}}, "time_to_first_token.unit is 'h'"),
    ],
)
def test_what_is_no_client_s_file_is_an_error_with_its_field(tmp_path: Path, tree: object, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        load_client(write(tmp_path, tree))


def test_one_of_several_benchmarks_is_chosen(tmp_path: Path) -> None:
    several = guidellm(result(900.0))
    several["benchmarks"] += guidellm(result(600.0))["benchmarks"]
    path = write(tmp_path, several)
    assert load_client(path, benchmark=2).total_tokens_per_s == pytest.approx(600.0, rel=0.01)
    with pytest.raises(InputError, match="no benchmark 3; there are 2"):
        load_client(path, benchmark=3)


@pytest.mark.parametrize(("ratio", "status"), [(1.0, Status.PASSED), (0.7, Status.FAILED), (1.2, Status.FAILED)])
def test_a_client_is_held_to_the_band_of_the_run(ratio: float, status: Status) -> None:
    run = example_run()
    verdict = validate(run, client=result(ratio * expected_tokens_per_s(run)))
    (case,) = [case for case in run_cases(verdict) if case.suite == "client"]
    assert case.status is status
    assert case.name == f"aiperf / expected at concurrency {CONCURRENCY}"
    assert verdict.client is not None
    assert verdict.client.ratio_to_expected == pytest.approx(ratio, rel=0.01)


def test_a_client_is_held_to_promised_percentiles_too() -> None:
    run = example_run()
    expected = expected_at(run)
    assert expected is not None
    slow = Percentiles(p50_s=0.1, p90_s=0.4, p99_s=0.9)  # of which p50 alone is missed
    promised = msgspec.structs.replace(expected, ttft=slow)
    open_loop = msgspec.structs.replace(run, arrivals="poisson, 2 requests/s", promised=promised)
    verdict = validate(open_loop, client=result(expected.total_tokens_per_s)).client
    assert verdict is not None
    assert verdict.outcome is Outcome.BELOW_EXPECTED
    assert verdict.statement.endswith("TTFT p50 is 1.500 x promised")


def test_the_report_has_its_figures_beside_those_of_the_run(command: Command, tmp_path: Path) -> None:
    run = example_run()
    save_record(tmp_path / "run.json", run)
    client = write(tmp_path, vllm(result(expected_tokens_per_s(run))))
    done = command("report", tmp_path / "run.json", "--client", client)
    assert done.exit_code == 0, done.stderr
    assert "ANOTHER CLIENT" in done.stdout
    sections = run_summary(run, validate(run, client=load_client(client))).sections
    found = {row[0]: row for section in sections for row in section.rows}
    assert found["TTFT mean"][2] == "200 ms"
    command("report", tmp_path / "run.json", "--client", client, "--html", tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert '<table id="client-table">' in page
    assert all(text in page for text in found["TTFT mean"][:4])
    gated = command("gate", tmp_path / "run.json", "--client", client)
    assert "vllm bench serve: " in gated.stdout
