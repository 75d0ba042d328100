"""The command: its record, the same bytes for a seed, how every output says that nothing was measured, mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helixbench import __main__ as front_door
from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.records import load_record, save_record
from helixbench.reference_server.run_log import RunLog
from helixbench.solver.problem.plan import Expected, Plan
from tests.reference_server.simulation.cases import MIXED, four_nodes, plan_of

ROOT = Path(__file__).parents[3]
SHORT = ["--duration-s", "2", "--warmup-s", "0.5"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with plan.json and cluster.json."""
    profile, plan = four_nodes()
    plan = plan_of(
        profile,
        {name: (held.start, held.end) for name, held in plan.placement.items()},
        [(["a", "b"], 2000.0), (["c", "b"], 1000.0), (["a", "d"], 1000.0)],
        workload=MIXED,
        expected=(Expected(concurrency=8, total_tokens_per_s=1900.0, output_tokens_per_s=500.0),),
    )
    save_record(tmp_path / "cluster.json", profile)
    save_record(tmp_path / "plan.json", plan)
    return tmp_path


def run_command(*arguments: str | Path) -> str:
    """stdout of a command that ends well."""
    done = CliRunner().invoke(front_door.app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def simulate(folder: Path, *options: str, output: str = "run.json") -> RunLog:
    run_command("simulate", folder / "plan.json", "--cluster", folder / "cluster.json", *options, "-o", folder / output)
    return load_record(folder / output, RunLog)


@pytest.mark.parametrize("load", [["--offline"], ["--rate", "40", "--burstiness", "0.5"], ["--concurrency", "8"]])
def test_two_processes_with_other_hash_seeds_write_the_same_bytes(files: Path, load: list[str]) -> None:
    written = []
    for hash_seed in ("1", "4242"):
        output = files / f"run-{hash_seed}.json"
        command = [sys.executable, "-m", "helixbench", "simulate", str(files / "plan.json"), "--cluster"]
        command += [str(files / "cluster.json"), "-o", str(output), "--routing", "swarm", "--seed", "3", *SHORT, *load]
        subprocess.run(
            command, check=True, capture_output=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": hash_seed}
        )
        written.append(output.read_bytes())
    assert written[0] == written[1]
    assert len(load_record(files / "run-1.json", RunLog).requests_in_window()) > 10


def test_another_seed_is_another_run(files: Path) -> None:
    runs = [simulate(files, "--concurrency", "8", "--seed", seed, *SHORT) for seed in ("0", "1")]
    assert runs[0].requests != runs[1].requests


def test_every_output_says_that_it_was_simulated(files: Path) -> None:
    printed = run_command(
        "simulate", files / "plan.json", "--cluster", files / "cluster.json", "--concurrency", "8", *SHORT,
        "-o", files / "run.json",
    )  # fmt: skip
    run = files / "run.json"
    assert load_record(run, RunLog).simulated
    assert "SIMULATED (no hardware ran)" in printed
    assert "SIMULATED RUN" in run_command("report", run)
    run_command("report", run, "--html", files / "page.html")
    assert "Simulated run" in (files / "page.html").read_text(encoding="utf-8")
    gated = CliRunner().invoke(front_door.app, ["gate", str(run), "--min-ratio", "0.1", "--max-ratio", "9"])
    assert "simulated" in gated.output
    assert "simulated" in run_command("report", run, "--markdown", files / "run.md") + (files / "run.md").read_text(
        encoding="utf-8"
    )


def test_a_run_is_held_against_the_promise_for_its_load(files: Path) -> None:
    closed = simulate(files, "--concurrency", "8", *SHORT)
    assert closed.concurrency == 8
    assert CliRunner().invoke(front_door.app, ["gate", str(files / "run.json"), "--min-ratio", "0.1"]).exit_code in (
        0,
        1,
    )

    simulate(files, "--rate", "20", *SHORT)
    gated = CliRunner().invoke(front_door.app, ["gate", str(files / "run.json")])
    assert gated.exit_code == 3
    assert "no prediction for open-loop arrivals" in gated.output

    simulate(files, "--offline", *SHORT)
    assert CliRunner().invoke(front_door.app, ["gate", str(files / "run.json"), "--min-ratio", "0.1"]).exit_code in (
        0,
        1,
    )


def test_compare_takes_two_simulated_runs(files: Path) -> None:
    simulate(files, "--concurrency", "8", *SHORT, output="one.json")
    simulate(files, "--concurrency", "8", "--routing", "random", *SHORT, output="two.json")
    done = CliRunner().invoke(front_door.app, ["compare", str(files / "one.json"), str(files / "two.json")])
    assert "total_tokens_per_s" in done.output or "tokens/s" in done.output


def test_json_is_the_record_and_nothing_else(files: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "helixbench", "simulate", files / "plan.json", "--cluster", files / "cluster.json",
         "--offline", *SHORT, "-o", files / "run.json", "--json"],
        check=True, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert json.loads(done.stdout)["schema"] == "helixbench.run/2"
    assert "SIMULATED" in done.stderr


def test_a_replay_comes_at_the_times_and_with_the_lengths_of_the_trace(files: Path) -> None:
    rows = ["2023-11-16 18:15:46.5,20,3", "2023-11-16 18:15:47.7500000,5,9", "2023-11-16 18:15:46.6805900,33,1"]
    (files / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")

    run = simulate(files, "--trace", str(files / "trace.csv"), "--replay", "--warmup-s", "0", "--duration-s", "3")

    came = sorted((round(r.arrival_s, 6), r.prompt_tokens, r.output_tokens) for r in run.requests)
    assert came == [(0.0, 20, 3), (0.18059, 33, 1), (1.25, 5, 9)]
    assert run.arrivals == "replay"


def test_a_model_that_is_no_longer_covered_ends_the_run_and_what_was_until_then_is_kept(files: Path) -> None:
    kills = [f'[[event]]\nkind = "kill"\nat_s = 1.5\nnode = "{node}"\n' for node in ("b", "d")]
    (files / "events.toml").write_text("".join(kills))
    run = simulate(files, "--offline", "--requests", "500", "--events", str(files / "events.toml"), "--warmup-s", "0")
    assert run.cut_short == "the nodes that are left do not cover the model"
    assert [change.after for change in run.adaptation.transitions if change.node == "b"][-1] == "lost"
    assert run.window.end_s < 70


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--offline", "--rate", "3"], "give one of them at most"),
        (["--replay"], "needs --trace"),
        (["--burstiness", "2", "--offline"], "goes with --rate"),
        (["--rate", "-1"], "rate_per_s: need more than 0"),
        (["--concurrency", "4", "--requests", "5", "--duration-s", "3"], "give one of them in a closed loop"),
        ([], "needs --concurrency"),
        (["--offline", "--kv-share", "0"], "--kv-share 0.0"),
        (["--offline", "--prompt-tokens", "100000000", "--output-tokens", "1"], "use shorter requests"),
        (["--offline", "--events", "missing.toml"], "missing.toml: cannot be read"),
        (["--offline", "--warmup-s", "-1"], r"--warmup-s\) is -1: need a finite number of seconds, at least 0"),
        (["--offline", "--warmup-s", "nan"], r"--warmup-s\) is nan"),
        (["--offline", "--warmup-s", "inf"], r"--warmup-s\) is inf"),
        (["--offline", "--duration-s", "nan"], r"--duration-s\) is nan"),
        (["--offline", "--duration-s", "inf"], r"--duration-s\) is inf"),
        (["--offline", "--duration-s", "0"], r"--duration-s\) is 0: need a finite number of seconds, more than 0"),
        (["--offline", "--requests", "3", "--duration-s", "nan"], r"--duration-s\) is nan"),
    ],
)
def test_mistakes_are_named(files: Path, options: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        simulate(files, *options)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            '[[event]]\nkind = "melt"\nat_s = 1\nnode = "a"\n',
            "kinds are slow, freeze, resume, kill, join, drain",
        ),
        ('[[event]]\nkind = "slow"\nat_s = 1\nnode = "a"\nfactor = 0\n', "factor: need more than 0"),
        ('[[event]]\nkind = "kill"\nat_s = -1\nnode = "a"\n', "at_s: need seconds >= 0"),
        ('[[event]]\nkind = "kill"\nat_s = 1\nnode = "z"\n', "names 'z', which the cluster does not have"),
        ("[[event", "neither TOML nor JSON"),
    ],
)
def test_mistakes_in_events_are_named(files: Path, text: str, says: str) -> None:
    (files / "events.toml").write_text(text)
    with pytest.raises(InputError, match=says):
        simulate(files, "--offline", "--events", str(files / "events.toml"))


def test_a_plan_of_another_cluster_is_refused(files: Path) -> None:
    profile = load_record(files / "cluster.json", ClusterProfile)
    smaller = ClusterProfile(model=profile.model, nodes=profile.nodes[:3], default_link=profile.default_link)
    save_record(files / "cluster.json", smaller)
    with pytest.raises(InputError, match=r"plan\.json: placement names d, which .* \(.*cluster\.json\)"):
        simulate(files, "--offline")


def test_a_row_of_a_trace_without_a_time_is_named(files: Path) -> None:
    rows = ["20,3,2023-11-16 18:15:46.5", "33,1"]
    (files / "trace.csv").write_text("ContextTokens,GeneratedTokens,TIMESTAMP\n" + "\n".join(rows) + "\n")
    with pytest.raises(InputError, match=r"trace\.csv:3: TIMESTAMP is None: need a time"):
        simulate(files, "--trace", str(files / "trace.csv"), "--replay")


def test_so_many_requests_are_simulated_where_stderr_is_a_file(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixbench.reference_server.simulation.simulator._EVENTS_A_TURN", 100)
    monkeypatch.setattr("helixbench.progress._PLAIN_EVERY_S", 0.0)
    arguments = [files / "plan.json", "--cluster", files / "cluster.json", "--offline", "--requests", "80"]
    printed = run_command("simulate", *arguments, "-o", files / "run.json")
    assert len(load_record(files / "run.json", RunLog).requests) == 80
    assert "simulating: " in printed


def test_the_record_holds_no_clock_and_no_host(files: Path) -> None:
    run = simulate(files, "--offline", *SHORT)
    assert (run.provenance.created, run.provenance.host, run.provenance.command) == ("", "", "")
    assert set(run.provenance.inputs) == {"plan", "cluster"}
    assert load_record(files / "plan.json", Plan) == run.plan
