"""Planning from a file needs neither torch nor transformers nor anything else of the ``serve`` extra."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from helixbench.records import load_record
from helixbench.solver import Plan, problems_of
from helixbench.solver.questions.generate import make_cluster

ROOT = Path(__file__).parents[1]
MODULE_OF = {"nvidia-ml-py": "pynvml", "prometheus-client": "prometheus_client", "pyzmq": "zmq"}
"""Where a distribution's module has another name."""

BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Absent())
"""


def distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[ ]", requirement)[0] for requirement in requirements}


def serve_extra() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return distributions(project["optional-dependencies"]["serve"])


def without_the_extra(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    blocked = {MODULE_OF.get(name, name) for name in serve_extra()}
    command = [sys.executable, "-c", BLOCK.format(blocked=blocked) + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_torch_and_what_serves_are_an_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"torch", "transformers"} <= serve_extra()
    assert not serve_extra() & distributions(project["dependencies"])


def test_the_block_blocks(tmp_path: Path) -> None:
    done = without_the_extra("import torch", cwd=tmp_path)
    assert "ModuleNotFoundError: No module named 'torch'" in done.stderr


def test_solve_works_on_capacity_tables_without_torch(tmp_path: Path) -> None:
    run = "import helixbench.solver; from helixbench.__main__ import main; main()"
    made = without_the_extra(run, "cluster", "make", "--nodes", "12", "-o", "c.json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    limits = ["--time-limit-s", "1", "--one-more-s", "0", "--concurrency", "4"]
    done = without_the_extra(run, "solve", "c.json", *limits, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    profile = make_cluster(num_nodes=12, num_types=3, num_regions=1, seed=0)
    assert not list(problems_of(profile, load_record(tmp_path / "plan.json", Plan)))
