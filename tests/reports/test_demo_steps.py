from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from helixbench.records import encode_record
from helixbench.reports.demo import DemoConfig, demo_steps
from tests.reports.report_examples import example_run
from tests.reports.stand_in import write_stand_in

ROOT = Path(__file__).parents[2]

# Stands in for the program: each command writes its file, `bench` waits where it is told to, and cleans up on Ctrl-C.
STAND_IN = """
import os, shutil, sys, time
from pathlib import Path
command, *rest = sys.argv[1:]
if command == os.environ.get("FAIL_IN"):
    print("it broke", file=sys.stderr)
    sys.exit(3)
if command == os.environ.get("WAIT_IN"):
    Path(os.environ["OUT"], "waiting").touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3)
        Path(os.environ["OUT"], "cleaned").touch()
        sys.exit(130)
print("stdout of", command)
if command == "model":
    Path(rest[1]).mkdir(parents=True, exist_ok=True)
else:
    out = Path(rest[rest.index("-o") + 1])
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(os.environ["RUN"], out)
"""


def start_demo(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The demo command with the stand-in as ``helixbench``, in a process group of its own, as a shell starts it."""
    write_stand_in(tmp_path / "stand-in", STAND_IN)
    (tmp_path / "run.json").write_bytes(encode_record(example_run()))
    (tmp_path / "testbed.toml").touch()
    code = """
        import typer
        from helixbench.reports import cli
        app = typer.Typer()
        app.callback()(lambda: None)
        cli.mount(app)
        app()
    """
    paths = os.pathsep.join([str(tmp_path / "stand-in"), str(ROOT)])
    return subprocess.Popen(
        [
            *(sys.executable, "-c", textwrap.dedent(code), "demo", "--out", str(tmp_path / "out")),
            *("--testbed", str(tmp_path / "testbed.toml"), *arguments),
        ],
        env={**os.environ, "PYTHONPATH": paths, "RUN": str(tmp_path / "run.json"), "OUT": str(tmp_path), **environment},
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def test_the_chain_is_the_commands_that_a_user_would_type() -> None:
    config = DemoConfig(model=None, testbed=Path("t.toml"), out=Path("o"), is_json=False)

    commands = [" ".join(step.command) for step in demo_steps(config)]

    assert commands == [
        "model make o/model --preset tiny --seed 0",
        "profile --model o/model --testbed t.toml --budget-s 60 -o o/cluster.json",
        "solve o/cluster.json --prompt-tokens 64 --output-tokens 32 --concurrency 24 --time-limit-s 20 -o o/plan.json",
        "bench o/plan.json --model o/model --testbed t.toml --concurrency 24 --requests 144 "
        "--prompt-tokens 64 --output-tokens 32 -o o/run.json",
    ]


def test_a_given_model_is_not_made_and_the_own_testbed_is_the_commands_default() -> None:
    config = DemoConfig(model="some/model", testbed=None, out=Path("o"), is_json=False)

    steps = demo_steps(config)

    assert " ".join(steps[0].command) == "profile --model some/model --budget-s 60 -o o/cluster.json"
    assert not [argument for step in steps for argument in step.command if Path(argument).is_absolute()]


def test_the_demo_ends_in_the_report_and_its_files(tmp_path: Path) -> None:
    demo = start_demo(tmp_path, "--json")
    stdout, stderr = demo.communicate(timeout=60)

    assert demo.returncode == 0, stderr
    assert stdout.startswith("{")
    assert '"schema": "helixbench.verdict/2"' in stdout
    assert "VERDICT" in stderr
    assert "[2/5] Profile" in stderr
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("model", "cluster.json", "plan.json", "run.json", "report.html", "verdict.json"),
    }


def test_a_failing_step_ends_the_demo_with_its_exit_code(tmp_path: Path) -> None:
    demo = start_demo(tmp_path, FAIL_IN="solve")
    _, stderr = demo.communicate(timeout=60)

    assert demo.returncode == 3
    assert "it broke" in stderr
    assert "kept in" in stderr
    assert "model, cluster.json" in stderr
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_step_and_keeps_what_is_finished(tmp_path: Path, signal_number: int) -> None:
    demo = start_demo(tmp_path, WAIT_IN="bench")
    while not (tmp_path / "waiting").exists():
        assert demo.poll() is None, demo.communicate()
        time.sleep(0.02)

    if signal_number == signal.SIGINT:
        os.killpg(demo.pid, signal.SIGINT)  # as the terminal does: the whole foreground group
    else:
        demo.terminate()
    _, stderr = demo.communicate(timeout=30)

    assert demo.returncode == 128 + signal_number, stderr
    assert stderr.splitlines()[-1].endswith("kept in {}/: model, cluster.json, plan.json".format(tmp_path / "out"))
    assert (tmp_path / "cleaned").exists() == (signal_number == signal.SIGINT)
    assert "Traceback" not in stderr
