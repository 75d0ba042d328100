from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from helixbench.records import encode_record
from helixbench.reference_server.testbed.spec import load_testbed
from helixbench.reports.demo.demo import DemoConfig, demo_steps
from helixbench.reports.demo.settings import DemoCluster, setting_of, setting_of_own_devices
from tests.reports.report_examples import example_run
from tests.reports.stand_in import write_stand_in

ROOT = Path(__file__).parents[2]

# Stands in for the program: each command writes its file, `bench` waits where it is told to, and cleans up on Ctrl-C.
STAND_IN = """
import os, shutil, sys, time
from pathlib import Path
command, *rest = sys.argv[1:]
if os.environ.get("INFEASIBLE", "-") in rest and command == "solve":
    sys.exit(1)
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


def commands(config: DemoConfig) -> list[str]:
    return [" ".join(step.step.command) for step in demo_steps(config)]


def test_the_chain_is_the_commands_that_a_user_would_type() -> None:
    setting = setting_of(DemoCluster.TWO_PLACES)
    load = "--prompt-tokens 64 --output-tokens 16 --concurrency 28"
    where = "--model o/model --testbed two-places"

    assert commands(DemoConfig(setting=setting, model=None, out=Path("o"), is_json=False)) == [
        "model make o/model --preset nano --seed 0",
        f"profile {where} -o o/cluster.json",
        f"solve o/cluster.json {load} --time-limit-s 10 -o o/plan.json",
        f"simulate o/plan.json --cluster o/cluster.json {load} --requests 28 -o o/simulated.json",
        f"bench o/plan.json {where} {load} --requests 28 -o o/run.json",
        f"solve o/cluster.json {load} --method swarm -o o/swarm-plan.json",
        f"simulate o/swarm-plan.json --cluster o/cluster.json {load} --requests 28 -o o/swarm-simulated.json",
        f"bench o/swarm-plan.json {where} {load} --requests 28 --no-replan -o o/swarm-run.json",
        f"solve o/cluster.json {load} --method petals -o o/petals-plan.json",
        f"simulate o/petals-plan.json --cluster o/cluster.json {load} --requests 28 -o o/petals-simulated.json",
        f"bench o/petals-plan.json {where} {load} --requests 28 --no-replan -o o/petals-run.json",
    ]


def test_a_given_model_is_not_made_and_real_devices_have_no_baselines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)

    steps = commands(
        DemoConfig(setting=setting_of_own_devices(tmp_path), model="some/model", out=Path("o"), is_json=False)
    )

    assert steps[0] == "profile --model some/model --testbed two-cpus --budget-s 60 -o o/cluster.json"
    assert [step.split()[0] for step in steps] == ["profile", "solve", "simulate", "bench"]


def test_each_gpu_of_the_machine_is_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=80e9))

    nodes = load_testbed(setting_of_own_devices(tmp_path).testbed).local_nodes

    assert [(node.name, node.device, node.memory_bytes) for node in nodes] == [
        ("gpu0", "cuda:0", 68e9),
        ("gpu1", "cuda:1", 68e9),
    ]


def test_the_demo_ends_in_the_report_and_its_files(tmp_path: Path) -> None:
    demo = start_demo(tmp_path, "--json")
    stdout, stderr = demo.communicate(timeout=60)

    assert demo.returncode == 0, stderr
    assert stdout.startswith("{")
    assert '"schema": "helixbench.demo/1"' in stdout
    assert "VERDICT" in stderr
    assert "WHAT THE PLAN BROUGHT" in stderr
    assert "over swarm: measured ×1.000, simulated ×1.000, expected ×1.000" in stderr
    assert "[2/12] Profile" in stderr
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("model", "cluster.json", "plan.json", "simulated.json", "run.json", "report.html", "demo.json"),
        *(f"{method}-{kind}.json" for method in ("swarm", "petals") for kind in ("plan", "simulated", "run")),
    }


def test_a_baseline_without_a_placement_is_left_out(tmp_path: Path) -> None:
    demo = start_demo(tmp_path, "--json", INFEASIBLE="swarm")
    stdout, stderr = demo.communicate(timeout=60)

    assert demo.returncode == 0, stderr
    result = json.loads(stdout)
    assert [one["method"] for one in result["baselines"]] == ["petals"]


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
    kept = "model, cluster.json, plan.json, simulated.json"
    assert stderr.splitlines()[-1].endswith(f"kept in {tmp_path / 'out'}/: {kept}")
    assert (tmp_path / "cleaned").exists() == (signal_number == signal.SIGINT)
    assert "Traceback" not in stderr
