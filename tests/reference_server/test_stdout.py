"""With --json a command writes its record to stdout and nothing else, past ``sys.stdout`` too; without one, nothing.

Every command with ``--json`` runs in a process of its own, whose file descriptor 1 is read whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer

from helixbench.__main__ import app
from helixbench.records import save_record
from tests.conftest import ModelDir
from tests.reference_server.plans import THREE_IN_A_ROW, make_plan
from tests.reference_server.running import RunningAgents
from tests.reports.stand_in import write_stand_in
from tests.solver.clusters import DATA, demo_cluster

TIMEOUT_S = 300.0
WITH_JSON_BY_HAND = frozenset({"profile", "bench", "demo", "validate"})

ANSWERED = json.dumps({"status": "ready", "detail": "", "nodes": {}, "state": "draining"}).encode()

# The steps of demo and validate: noise on stdout, and no result.
NOISY_STEPS = """
import os, sys

if sys.argv[1] in ("demo", "validate"):
    import importlib.util

    path = os.environ["REAL_MAIN"]
    spec = importlib.util.spec_from_file_location("real_main", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["real_main"] = module
    spec.loader.exec_module(module)
    module.main()
os.write(1, b"noise\\n")
sys.exit(3)
"""
SUITE = """
[model]
preset = "tiny"
[[testbed]]
name = "one"
[[testbed.node]]
name = "a"
memory = "200MB"
[[workload]]
name = "chat"
prompt_tokens = 8
output_tokens = 4
[[case]]
testbed = "one"
workload = "chat"
concurrency = 2
requests = 4
"""


def commands_with_json() -> set[str]:
    def walk(command: Any, name: str) -> Iterator[str]:
        if any("--json" in parameter.opts for parameter in command.params):
            yield name
        for below, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, f"{name} {below}".strip())

    return set(walk(typer.main.get_command(app), ""))


def stdout_of(folder: Path, *arguments: object, **environment: str) -> str:
    argv = [sys.executable, "-m", "helixbench", *map(str, arguments), "--json"]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=folder, env=os.environ | environment, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 1, 3), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cluster, its plan, and a simulated run."""
    folder = tmp_path_factory.mktemp("files")
    save_record(folder / "cluster.json", demo_cluster())
    quick = ("--concurrency", "4", "--time-limit-s", "1", "--prompt-tokens", "20", "--output-tokens", "4")
    stdout_of(folder, "solve", "cluster.json", *quick, "-o", "plan.json")
    stdout_of(folder, "simulate", "plan.json", "--cluster", "cluster.json", "--requests", "12", "-o", "run.json")
    (folder / "history.jsonl").write_text("")
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """What answers as a running server does."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(ANSWERED)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answers) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


PRINTS = f"{sys.executable} -c 'print(1)'"
ARGUMENTS: dict[str, Callable[[Path, str], list[object]]] = {
    "profile import": lambda _, __: [
        *(DATA / "clusters" / "published24-llama70b.json", "--tables", DATA / "gpu_profiles", "-o", "imported.json")
    ],
    "solve": lambda _, __: ["cluster.json", "--concurrency", 4, "--time-limit-s", 2, "-o", "again.json"],
    "simulate": lambda _, __: ["plan.json", "--cluster", "cluster.json", "--rate", 2, "--requests", 9, "-o", "s.json"],
    "doctor": lambda _, __: [],
    "check": lambda _, model: ["history.jsonl", "--model", model],
    "report": lambda _, __: ["run.json"],
    "compare": lambda _, __: ["run.json", "run.json"],
    "gate check": lambda _, __: ["run.json"],
    "gate pairs": lambda _, __: ["--base", PRINTS, "--new", PRINTS, "--rounds", 3, "--max-rounds", 3],
}


def test_every_command_that_prints_a_record_is_tried_here() -> None:
    assert commands_with_json() == {*ARGUMENTS, *WITH_JSON_BY_HAND, "cluster status", "cluster drain"}


@pytest.mark.parametrize("command", ARGUMENTS)
def test_the_record_alone_is_on_stdout(command: str, files: Path, model_dir: ModelDir) -> None:
    printed = stdout_of(files, *command.split(), *ARGUMENTS[command](files, str(model_dir("test-llama"))))
    assert isinstance(json.loads(printed), dict)


@pytest.mark.parametrize("command", [["status"], ["drain", "a"]])
def test_the_answer_of_a_server_alone_is_on_stdout(command: list[str], server: str, tmp_path: Path) -> None:
    assert json.loads(stdout_of(tmp_path, "cluster", *command, "--url", server)) == json.loads(ANSWERED)


def test_what_nodes_and_their_driver_write_is_not_on_stdout(
    running: RunningAgents, model_dir: ModelDir, tmp_path: Path
) -> None:
    model = model_dir("test-llama")
    save_record(tmp_path / "plan.json", make_plan(model, *THREE_IN_A_ROW))
    agents = [one for name, at in running.addresses.items() for one in ("--agent", f"{name}={at}")]
    place = ["--model", model, *agents, "--key", running.key_file]
    load = ["--concurrency", 2, "--requests", 4]
    assert json.loads(stdout_of(tmp_path, "bench", "plan.json", *place, *load, "-o", "run.json"))["concurrency"] == 2
    assert json.loads(stdout_of(tmp_path, "profile", *place, "--only", "network", "-o", "links.json"))["links"]


@pytest.mark.parametrize("command", [["demo"], ["validate", "--suite", "suite.toml"]])
def test_what_the_steps_of_a_command_write_is_not_on_stdout(command: list[str], tmp_path: Path) -> None:
    import helixbench.__main__

    write_stand_in(tmp_path / "first", NOISY_STEPS)
    (tmp_path / "suite.toml").write_text(SUITE)
    printed = stdout_of(
        tmp_path,
        *command,
        PYTHONPATH=f"{tmp_path / 'first'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        REAL_MAIN=str(Path(helixbench.__main__.__file__)),
    )
    assert not printed or isinstance(json.loads(printed), dict)
