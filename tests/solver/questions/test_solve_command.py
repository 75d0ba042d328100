"""The solve command: options, outputs, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile, DefaultLink
from helixbench.records import decode_record, load_record, save_record
from helixbench.solver import Infeasible, Plan, cli
from helixbench.solver.problem.workload import trace_workload
from tests.solver.clusters import demo_cluster, model, random_cluster, table_node

SHORT = ("--time-limit-s", "2")


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()

    @made.callback()
    def root() -> None: ...

    cli.mount(made)
    return made


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.json"
    save_record(path, demo_cluster())
    return path


def test_solve_writes_a_plan_and_prints_a_summary(app: typer.Typer, cluster: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    result = CliRunner().invoke(app, ["solve", str(cluster), "--concurrency", "8", *SHORT, "-o", str(plan)])
    assert result.exit_code == 0, result.output
    assert "max-flow" in result.stdout
    assert "fixed 512 in, 128 out" in result.stdout
    written = load_record(plan, Plan)
    assert [step.concurrency for step in written.predicted.expected] == [1, 2, 4, 8]
    devices = {node.name: node.device.name for node in demo_cluster().nodes}
    assert {name: use.device for name, use in written.nodes.items()} == {n: devices[n] for n in written.nodes}


def test_json_alone_is_on_stdout(app: typer.Typer, cluster: Path, tmp_path: Path) -> None:
    options = [
        "--objective",
        "max-flow",
        "--prompt-tokens",
        "64",
        "--output-tokens",
        "32",
        "--json",
    ]
    result = CliRunner().invoke(app, ["solve", str(cluster), *options, "-o", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.output
    assert msgspec.json.decode(result.stdout, type=Plan) == load_record(tmp_path / "plan.json", Plan)
    assert "plan written to" in result.stderr


def test_the_process_writes_nothing_but_the_record_to_its_stdout(cluster: Path, tmp_path: Path) -> None:
    """Past ``sys.stdout``, too: HiGHS greets on the file descriptor."""
    command = [sys.executable, "-m", "helixbench", "solve", str(cluster), "--concurrency", "8", *SHORT, "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert msgspec.json.decode(done.stdout, type=Plan) == load_record(tmp_path / "plan.json", Plan)
    assert b"HiGHS" not in done.stderr


def test_the_bottleneck_and_its_marginal_value_are_printed_and_in_the_plan(app: typer.Typer, tmp_path: Path) -> None:
    cluster, plan = tmp_path / "cluster.json", tmp_path / "plan.json"
    nodes = (table_node("a", [60.0, 30.0]), table_node("b", [50.0]))
    save_record(cluster, ClusterProfile(model=model(3), nodes=nodes, default_link=DefaultLink(1e9)))
    result = CliRunner().invoke(app, ["solve", str(cluster), "--objective", "max-flow", "-o", str(plan)])
    assert result.exit_code == 0, result.output
    assert "bottleneck: gpu2 holds layers [" in result.stdout
    assert [value.name for value in load_record(plan, Plan).predicted.marginal] == ["a"]


def test_infeasible_is_an_answer_with_exit_code_1(app: typer.Typer, tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    nodes = (table_node("a", [1.0] * 5), table_node("b", [1.0] * 6))
    save_record(path, ClusterProfile(model=model(16), nodes=nodes, default_link=DefaultLink(1e9)))
    result = CliRunner().invoke(app, ["solve", str(path), "--json", "-o", str(tmp_path / "plan.json")])
    assert result.exit_code == 1
    reason = "the model needs 16 layers; all nodes together hold 11: a 5, b 6"
    assert reason in result.stderr
    assert decode_record(result.stdout.encode(), Infeasible, origin="stdout") == Infeasible(reason=reason)
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "magic"], "no such method"),
        (["--time-limit-s", "0"], "more than 0 seconds"),
        (["--time-limit-s", "nan"], "more than 0 seconds"),
        (["--time-limit-s", "inf"], "finite"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", "2147483648"], "need 0 to 2147483647"),
        (["--trace", "nowhere.csv", "--trace-scale", "0"], "--trace-scale 0"),
        (["--trace", "nowhere.csv", "--trace-scale", "nan"], "--trace-scale nan"),
        (["--trace", "nowhere.csv", "--trace-scale", "inf"], "--trace-scale inf"),
        (["--pin", "big=[0,2)", "--pin", "big=[2,4)"], "big is pinned to [0,2) already"),
        (["--concurrency", "0"], "at least 1 request"),
        (["--threads", "0"], "at least 1"),
        (["--prompt-tokens", "5"], "give both or neither"),
        (["--trace", "nowhere.csv", "--prompt-tokens", "5"], "give one"),
        (["--trace", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_wrong_options_are_input_errors(
    app: typer.Typer, cluster: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    result = CliRunner().invoke(app, ["solve", str(cluster), *options, "-o", str(tmp_path / "plan.json")])
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)


def test_a_trace_is_not_scaled_beyond_what_can_be_counted(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("ContextTokens,GeneratedTokens\n1000,10\n")
    with pytest.raises(InputError, match=r"trace\.csv:2: 1000 and 10 tokens x --trace-scale 1e\+307"):
        trace_workload(tmp_path / "trace.csv", scale=1e307)


@pytest.mark.parametrize("place", ["file/plan.json", "folder"])
def test_a_place_for_the_plan_is_tried_before_the_search(
    app: typer.Typer, cluster: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    searches: list[object] = []
    monkeypatch.setattr("helixbench.solver.questions.answer.answer", lambda *arguments, **_: searches.append(arguments))
    result = CliRunner().invoke(app, ["solve", str(cluster), *SHORT, "-o", str(tmp_path / place)])
    assert isinstance(result.exception, InputError)
    assert f"{place}: cannot be written" in str(result.exception)
    assert not searches


def test_same_input_and_seed_give_the_same_plan(app: typer.Typer, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.json"
    save_record(cluster, random_cluster(8))
    plans = []
    for name in ("one.json", "two.json"):
        options = ["--objective", "max-flow", "-o", str(tmp_path / name)]
        result = CliRunner().invoke(app, ["solve", str(cluster), *options])
        assert result.exit_code == 0, result.output
        plans.append(load_record(tmp_path / name, Plan))
    assert plans[0].placement == plans[1].placement
    assert plans[0].flows == plans[1].flows
