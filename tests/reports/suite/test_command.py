from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from helixbench.errors import InputError
from helixbench.records import load_record, save_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.render.markdown import markdown
from helixbench.reports.suite import run as suite_run
from helixbench.reports.suite.child import INTERRUPTED
from helixbench.reports.suite.file import load_suite
from helixbench.reports.suite.result import SuiteResult, Tolerance
from helixbench.reports.suite.run import SuiteOptions, run_suite
from helixbench.reports.suite.summary import suite_summary
from tests.reports.conftest import Command
from tests.reports.stand_in import write_stand_in
from tests.reports.suite.suite_examples import SUITE, TESTBED, StandIn, write_suite

ROOT = Path(__file__).parents[3]
PREPARED = ["model results/model", "profile two/cluster.json", "profile inline/cluster.json"]
PLANNED = [
    f"{step} {case}/{made}.json"
    for case in ("two-chat", "full")
    for step, made in (("solve", "plan"), ("simulate", "simulated"))
]


def run(
    tmp_path: Path, stand_in: StandIn, *, repeats: int = 2, resume: bool = False, allow_stale: bool = False
) -> SuiteResult:
    suite = load_suite(write_suite(tmp_path / "suite") if not (tmp_path / "suite").exists() else suite_file(tmp_path))
    options = SuiteOptions(
        out=tmp_path / "results", repeats=repeats, tolerance=Tolerance(), resume=resume, allow_stale=allow_stale
    )
    return run_suite(suite, options, run=stand_in)


def suite_file(tmp_path: Path) -> Path:
    return tmp_path / "suite" / "suite.toml"


def test_each_testbed_is_profiled_once_and_the_repeats_of_all_cases_come_in_turn(tmp_path: Path) -> None:
    stand_in = StandIn()
    result = run(tmp_path, stand_in)

    rounds = [f"bench {case}/run-{repeat}.json" for repeat in (1, 2) for case in ("two-chat", "full")]
    assert stand_in.commands == [*PREPARED, *PLANNED, *rounds]
    assert [(case.name, case.num_repeats) for case in result.cases] == [("two-chat", 2), ("full", 2)]
    assert load_record(tmp_path / "results" / "suite.json", SuiteResult) == result


def test_the_steps_are_the_commands_that_a_user_would_type(tmp_path: Path) -> None:
    stand_in = StandIn()
    run(tmp_path, stand_in, repeats=1)

    out = tmp_path / "results"
    place = f"--model {out}/model --testbed {tmp_path}/suite/two.toml"
    commands = [" ".join(call) for call in stand_in.calls]
    assert commands[0] == f"model make {out}/model --preset tiny --seed 0"
    assert commands[1] == (
        f"profile {place} -o {out}/testbeds/two/cluster.json "
        "--budget-s 100 --max-batch-tokens 128 --max-context-tokens 512"
    )
    assert commands[3] == (
        f"solve {out}/testbeds/two/cluster.json --prompt-tokens 64 --output-tokens 32 --concurrency 16 "
        f"--time-limit-s 20 -o {out}/cases/two-chat/plan.json"
    )
    assert commands[4] == (
        f"simulate {out}/cases/two-chat/plan.json --cluster {out}/testbeds/two/cluster.json --prompt-tokens 64 "
        f"--output-tokens 32 --concurrency 16 --requests 240 -o {out}/cases/two-chat/simulated.json"
    )
    assert commands[7] == (
        f"bench {out}/cases/two-chat/plan.json {place} --concurrency 16 --requests 48 --seed 1 "
        f"-o {out}/cases/two-chat/run-1.json"
    )


def test_records_name_files_as_seen_from_here_and_are_gone_on_with_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stand_in = StandIn()
    run(tmp_path, stand_in, repeats=1)

    assert stand_in.calls[1][:5] == ("profile", "--model", "results/model", "--testbed", "suite/two.toml")
    assert not [one for call in stand_in.calls for one in call if str(tmp_path) in one]
    monkeypatch.chdir(tmp_path / "suite")
    again = StandIn()
    run(tmp_path, again, repeats=1, resume=True)
    assert again.calls == []


def test_a_stale_profile_is_served_where_it_is_allowed_and_the_result_says_so(tmp_path: Path) -> None:
    stand_in = StandIn()
    run(tmp_path, stand_in, repeats=1)
    assert "--allow-stale" not in stand_in.calls[-1]

    again = StandIn(stale=("big: torch 2.10 -> 2.11",))
    result = run(tmp_path, again, resume=True, allow_stale=True)
    assert again.commands == ["bench two-chat/run-2.json", "bench full/run-2.json"], "the first are not stale"
    assert again.calls[0][-1] == "--allow-stale"
    assert [case.stale for case in result.cases] == [("big: torch 2.10 -> 2.11",)] * 2
    assert "two-chat: stale profile: big: torch 2.10 -> 2.11" in markdown(suite_summary(result))

    allowed, refused = StandIn(), StandIn()
    run(tmp_path, allowed, resume=True, allow_stale=True)
    run(tmp_path, refused, resume=True)
    assert allowed.commands == []
    assert refused.commands == ["bench two-chat/run-2.json", "bench full/run-2.json"]


def test_with_kv_caches_full_the_plan_says_how_many_requests_that_is(tmp_path: Path) -> None:
    stand_in = StandIn()
    result = run(tmp_path, stand_in, repeats=1)

    assert "--concurrency" not in stand_in.calls[5]
    for call in (stand_in.calls[6], stand_in.calls[8]):
        assert call[call.index("--concurrency") + 1] == "16", "the last of what the plan expects"
    assert result.cases[1].concurrency == 16


def test_a_window_holds_whole_rounds_of_all_in_flight(tmp_path: Path) -> None:
    """Half a round has more of the prompts than of the tokens that follow them, or fewer."""
    write_suite(tmp_path / "suite", SUITE.replace("requests = 48", "requests = 40"))
    stand_in = StandIn()
    run(tmp_path, stand_in, repeats=1)

    asked = {call[0]: call[call.index("--requests") + 1] for call in stand_in.calls if "--requests" in call}
    assert asked == {"simulate": "240", "bench": "48"}, "3 rounds of 16, and 5 times as many"


def test_resuming_runs_only_what_is_missing(tmp_path: Path) -> None:
    first = run(tmp_path, StandIn(), repeats=1)
    again = StandIn()
    result = run(tmp_path, again, repeats=2, resume=True)

    assert again.commands == ["bench two-chat/run-2.json", "bench full/run-2.json"]
    assert result.cases[0].ratios[0] == first.cases[0].ratios[0]
    assert [case.num_repeats for case in result.cases] == [2, 2]


def test_resuming_makes_again_what_no_longer_holds(tmp_path: Path) -> None:
    run(tmp_path, StandIn())
    cases = tmp_path / "results" / "cases"
    cut = cases / "two-chat" / "run-2.json"
    save_record(cut, replace(load_record(cut, RunLog), cut_short="interrupted"))
    (cases / "full" / "run-1.json").write_text("{")
    again = StandIn()
    run(tmp_path, again, resume=True)
    assert again.commands == ["bench full/run-1.json", "bench two-chat/run-2.json"]
    (cases / "two-chat" / "simulated.json").unlink()
    again = StandIn()
    run(tmp_path, again, resume=True)
    assert again.commands == ["simulate two-chat/simulated.json"]

    (tmp_path / "suite" / "two.toml").write_text(TESTBED.replace("100MB", "90MB"))  # another profile is another plan
    again = StandIn()
    run(tmp_path, again, resume=True)
    assert again.commands[:2] == ["profile two/cluster.json", "solve two-chat/plan.json"]


def test_other_options_of_a_step_make_it_again_and_all_that_follows_from_it(tmp_path: Path) -> None:
    run(tmp_path, StandIn(), repeats=1)
    write_suite(tmp_path / "suite", f"solve_time_limit_s = 7\n{SUITE}")
    again = StandIn()
    run(tmp_path, again, repeats=1, resume=True)
    assert again.commands == [*PLANNED, "bench two-chat/run-1.json", "bench full/run-1.json"]


def test_a_results_folder_may_be_moved(tmp_path: Path) -> None:
    run(tmp_path, StandIn(), repeats=1)
    (tmp_path / "moved").mkdir()
    (tmp_path / "results").rename(tmp_path / "moved" / "results")
    (tmp_path / "suite").rename(tmp_path / "moved" / "suite")
    again = StandIn()
    run(tmp_path / "moved", again, repeats=1, resume=True)
    assert again.calls == []


def test_results_are_not_overwritten_unasked(tmp_path: Path) -> None:
    run(tmp_path, StandIn(), repeats=1)
    with pytest.raises(InputError, match="--resume"):
        run(tmp_path, StandIn(), repeats=1)


def test_a_testbed_that_cannot_be_profiled_leaves_its_cases_unmeasured_and_the_others_go_on(tmp_path: Path) -> None:
    stand_in = StandIn(exits={1: 3})
    result = run(tmp_path, stand_in)

    two, full = result.cases
    assert (two.outcome, two.reasons) == ("not measured", ("two: profile: exit 3: helixbench: it broke",))
    assert full.num_repeats == 2
    assert "solve two-chat/plan.json" not in stand_in.commands


def test_a_repeat_that_fails_is_missing_and_the_rest_is_judged(tmp_path: Path) -> None:
    result = run(tmp_path, StandIn(exits={7: 3}), repeats=3)

    two, full = result.cases
    assert (two.num_repeats, full.num_repeats) == (2, 3)
    assert two.reasons == ("two-chat: serve and load, repeat 1: exit 3: helixbench: it broke",)
    assert two.ratio is not None


def test_percentiles_are_predicted_by_the_simulated_plan(tmp_path: Path) -> None:
    case = run(tmp_path, StandIn()).cases[0]
    simulated = load_record(tmp_path / "results" / "cases" / "two-chat" / "simulated.json", RunLog)

    assert [latency.kind for latency in case.simulated] == ["ttft", "tpot"]
    for latency in case.simulated:
        assert (latency.p90_s, latency.p99_s) == simulated.latency_percentiles(latency.kind, (90.0, 99.0))


def test_a_simulation_that_fails_leaves_the_case_measured_and_percentiles_unpredicted(tmp_path: Path) -> None:
    case = run(tmp_path, StandIn(exits={4: 3})).cases[0]

    assert case.num_repeats == 2
    assert case.reasons == ("two-chat: simulate: exit 3: helixbench: it broke",)
    assert case.simulated == ()
    assert all(latency.predicted_mean_s is not None for latency in case.latencies)


def test_an_interrupt_ends_the_suite_with_what_there_is(tmp_path: Path) -> None:
    stand_in = StandIn(exits={9: INTERRUPTED})
    result = run(tmp_path, stand_in, repeats=5)

    assert result.is_interrupted
    assert len(stand_in.calls) == 10
    assert [case.num_repeats for case in result.cases] == [1, 1]
    assert load_record(tmp_path / "results" / "suite.json", SuiteResult).is_interrupted


def test_an_interrupt_while_resuming_loses_no_earlier_run(tmp_path: Path) -> None:
    first = run(tmp_path, StandIn(), repeats=2)
    (tmp_path / "results" / "cases" / "full" / "run-1.json").unlink()
    result = run(tmp_path, StandIn(exits={0: INTERRUPTED}), repeats=2, resume=True)

    assert [case.num_repeats for case in result.cases] == [2, 1]
    assert sorted(result.cases[0].ratios) == sorted(first.cases[0].ratios)


def test_the_command_prints_one_table_and_ends_with_its_answer(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = StandIn(speeds=(1.0, 0.75))  # in turn: the first case as expected, the second not
    monkeypatch.setattr(suite_run, "run_child", stand_in)
    table = tmp_path / "table.md"
    done = command(
        *("validate", "--suite", write_suite(tmp_path / "suite"), "-o", tmp_path / "results"),
        *("--repeats", "3", "--markdown", table, "--tpot-tolerance", "0.5"),
    )

    assert done.exit_code == 1, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    rows = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines() if "±" in line}
    assert rows == {"two-chat": "ok", "full": "off"}
    assert "### helixbench suite: small: 1 of 2 cases ok" in table.read_text()
    verdicts = [line.split(" | ")[-1] for line in table.read_text().splitlines() if "±" in line]
    assert verdicts == ["**ok** |", "**off** |"]


def test_json_goes_to_stdout_alone(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_run, "run_child", StandIn())
    arguments = ("validate", "--suite", write_suite(tmp_path / "suite"), "-o", tmp_path / "results", "--repeats", "1")
    done = command(*arguments, "--json", "--strict")

    (tmp_path / "printed.json").write_text(done.stdout)
    printed = load_record(tmp_path / "printed.json", SuiteResult)
    assert [case.outcome for case in printed.cases] == ["inconclusive", "inconclusive"]
    assert done.exit_code == 4
    assert "SUITE" in done.stderr


@pytest.mark.parametrize(
    "wrong", [["--only", "none"], ["--min-ratio", "1.2"], ["--tpot-tolerance", "0"], ["--repeats", "0"]]
)
def test_wrong_options_end_with_2(tmp_path: Path, command: Command, wrong: list[str]) -> None:
    assert command("validate", "--suite", write_suite(tmp_path), "-o", tmp_path / "r", *wrong).exit_code == 2


def test_a_second_suite_is_refused_and_nothing_is_run(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite_run, "run_child", lambda *_, **__: pytest.fail("run"))
    first, second = write_suite(tmp_path / "first"), write_suite(tmp_path / "second")
    done = command("validate", "--suite", first, "--suite", second, "-o", tmp_path / "results")

    assert done.exit_code == 2
    assert "one suite at a time" in done.stderr
    assert not (tmp_path / "results").exists()
    assert command("validate", "-o", tmp_path / "results").exit_code == 2


# Stands in for the program: `bench` waits in its second call, and cleans up on Ctrl-C.
PROGRAM = """
import os, sys, time
from pathlib import Path
from tests.reports.suite.suite_examples import make_record
arguments = sys.argv[1:]
if arguments[0] == "bench" and "full" in arguments[1]:
    Path("waiting").touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3)
        Path("cleaned").touch()
        sys.exit(0)  # as bench ends that was stopped within its window
make_record(arguments, speed=1.0, seed=0)
"""


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_waits_for_the_step_and_prints_the_table_of_what_there_is(tmp_path: Path, signal_number: int) -> None:
    write_stand_in(tmp_path / "stand-in", PROGRAM)
    code = """
        import typer
        from helixbench.reports import cli
        app = typer.Typer()
        app.callback()(lambda: None)
        cli.mount(app)
        app()
    """
    suite = subprocess.Popen(
        [
            *(sys.executable, "-c", textwrap.dedent(code), "validate"),
            *("--suite", str(write_suite(tmp_path / "suite")), "-o", "results"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "stand-in"), str(ROOT)])},
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while not (tmp_path / "waiting").exists():
        assert suite.poll() is None, suite.communicate()
        time.sleep(0.02)

    if signal_number == signal.SIGINT:
        os.killpg(suite.pid, signal.SIGINT)  # as the terminal does: the whole foreground group
    else:
        suite.terminate()
    stdout, stderr = suite.communicate(timeout=30)

    assert suite.returncode == INTERRUPTED, stderr
    assert "Traceback" not in stderr
    assert "interrupted" in stdout
    assert "two-chat: total tokens/s inconclusive: " in " ".join(stdout.split())
    assert "full: no repeat could be measured" in " ".join(stdout.split())
    assert (tmp_path / "cleaned").exists() == (signal_number == signal.SIGINT)
    kept = load_record(tmp_path / "results" / "suite.json", SuiteResult)
    assert [case.num_repeats for case in kept.cases] == [1, 0]
