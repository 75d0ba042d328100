from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helixbench.reports import cli
from helixbench.reports.verdict.metrics import IS_HIGHER_BETTER

DOCS = Path(__file__).parents[2] / "docs"
WORKFLOW = DOCS / "examples" / "github-gate.yml"


def lint(workflow: Path) -> int:
    """Exit code of check-jsonschema with GitHub's schema of workflows, which it carries: no network."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(workflow)]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode


def test_the_example_workflow_is_valid_to_a_linter() -> None:
    assert lint(WORKFLOW) == 0


@pytest.mark.parametrize(
    ("right", "wrong"), [("runs-on: ubuntu-24.04", "run-on: ubuntu-24.04"), ("if: always()", "if: [always]")]
)
def test_the_linter_refuses_a_broken_workflow(right: str, wrong: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOW.read_text().replace(right, wrong, 1))

    assert broken.read_text() != WORKFLOW.read_text()
    assert lint(broken) == 1


def test_the_example_workflow_calls_commands_and_options_that_exist() -> None:
    text = re.sub(r"\\\n", " ", WORKFLOW.read_text())
    pairs = re.search(r"gate pairs(.*?)- name", text, re.DOTALL)

    assert pairs is not None
    words = shlex.split(pairs.group(1))
    assert words[words.index("--metric") + 1] in IS_HIGHER_BETTER
    assert {w for w in words if w.startswith("--")} <= {
        *("--base", "--new", "--metric", "--rounds", "--max-rounds", "--junit", "--markdown", "--benchmark-json"),
    }


def test_every_picture_and_file_that_the_docs_name_is_there() -> None:
    text = (DOCS / "reports.md").read_text()

    targets = re.findall(r"\]\(([^)#]+)\)", text)
    assert targets
    for target in targets:
        assert (DOCS / target).exists(), target


def test_the_commands_of_the_docs_exist() -> None:
    text = (DOCS / "reports.md").read_text()

    named = set(re.findall(r"^helixbench (\w+)", text, re.MULTILINE))
    assert named == {"report", "gate", "compare"}
    assert callable(cli.mount)
