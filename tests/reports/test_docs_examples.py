from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import reports.cli
from reports.metrics import IS_HIGHER_BETTER

DOCS = Path(__file__).parents[2] / "docs"
WORKFLOW = DOCS / "examples" / "github-gate.yml"


def test_the_example_workflow_is_valid() -> None:
    yaml = pytest.importorskip("yaml", reason="no PyYAML here: pip install pyyaml")
    schemas = pytest.importorskip("check_jsonschema", reason="no linter here: pip install check-jsonschema")
    del yaml

    assert schemas.main(["--builtin-schema", "vendor.github-workflows", str(WORKFLOW)], standalone_mode=False) in (
        0,
        None,
    )


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
    assert named == {"report", "gate"}
    assert callable(reports.cli.mount)
