"""Planning from a file needs neither torch nor transformers nor anything else of the ``serve`` extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helixbench.records import load_record
from helixbench.solver import Plan, problems_of
from helixbench.solver.questions.generate import make_cluster
from tests.distributions import modules

BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Absent())
"""


def without_the_extra(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK.format(blocked=modules("serve")) + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_torch_and_what_serves_are_an_extra() -> None:
    assert {"torch", "transformers"} <= modules("serve")
    assert not modules("serve") & modules("dependencies")


def test_the_block_blocks(tmp_path: Path) -> None:
    done = without_the_extra("import torch", cwd=tmp_path)
    assert "ModuleNotFoundError: No module named 'torch'" in done.stderr


def test_solve_works_on_capacity_tables_without_torch(tmp_path: Path) -> None:
    run = "import helixbench.solver; from helixbench.__main__ import main; main()"
    made = without_the_extra(run, "cluster", "make", "--nodes", "12", "-o", "c.json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    limits = ["--time-limit-s", "1", "--concurrency", "4"]
    done = without_the_extra(run, "solve", "c.json", *limits, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    profile = make_cluster(num_nodes=12, num_types=3, num_regions=1, seed=0)
    assert not list(problems_of(profile, load_record(tmp_path / "plan.json", Plan)))
