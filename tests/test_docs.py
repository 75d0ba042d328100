"""README and docs: their commands parse, their links lead somewhere, their TOML files load, their workflow is valid."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from helixbench.__main__ import app
from helixbench.reference_server.testbed.spec import testbed_from_tree as read_testbed
from helixbench.reports.suite.file import load_suite
from helixbench.reports.verdict.run_metrics import IS_HIGHER_BETTER
from helixbench.solver.simulation.events import load_events

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
"""Dated campaigns; their commands are those of their time."""
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
CURRENT = [page for page in PAGES if RESULTS not in page.parents and page.name != "CHANGELOG.md"]
WORKFLOW = DOCS / "examples" / "github-gate.yml"
COMMAND: Any = typer.main.get_command(app)
TOP = set(COMMAND.commands)
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # click's, or typer's own copy of it: by version


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """Fenced code blocks of one language; ``""`` is a block that names none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for named, text in found if named == language]


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each ``helixbench ...`` in a page's code blocks, without the program's name."""
    for line in "\n".join(blocks(page, "")).splitlines():
        if line.startswith("helixbench "):
            yield shlex.split(line, comments=True)[1:]


def mentions(page: Path) -> Iterator[list[str]]:
    """The same of commands in backticks, which need not be complete."""
    for line in re.findall(r"`helixbench ([^`]+)`", without_blocks(page)):
        yield [word for word in shlex.split(line) if word != "--help"]


def problem_of(words: list[str], *, is_whole: bool = True) -> str:
    """Why a command line is not accepted; empty where it is. Nothing runs, and files need not exist."""
    command, context = COMMAND, COMMAND.context_class(COMMAND)
    try:
        while hasattr(command, "commands"):
            context = command.make_context(command.name, list(words), parent=context, resilient_parsing=True)
            rest = [*context._protected_args, *context.args]
            if not rest:
                break
            _, command, words = command.resolve_command(context, rest)
        if command is None:
            return f"no command {context._protected_args}"
        command.make_context(command.name, list(words), parent=context)
    except USAGE_ERROR as error:
        is_missing = error.format_message().startswith("Missing ")
        return "" if is_missing and not is_whole else error.format_message()
    return ""


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_commands_of_a_page_name_commands_and_options_that_exist(page: Path) -> None:
    whole = [(words, problem_of(words)) for words in commands(page)]
    parts = [(words, problem_of(words, is_whole=False)) for words in mentions(page) if words and words[0] != "COMMAND"]
    assert [(words, problem) for words, problem in [*whole, *parts] if problem] == []


def test_the_check_of_commands_sees_what_is_wrong() -> None:
    assert problem_of(["solve", "c.json", "--time-limit-s", "3"]) == ""
    assert problem_of(["gate", "run.json"]) == ""
    assert "solv" in problem_of(["solv", "c.json"])
    assert "--tome-limit-s" in problem_of(["solve", "c.json", "--tome-limit-s", "3"])
    assert "argument" in problem_of(["solve", "c.json", "--time-limit-s"])
    assert "--objective" in problem_of(["solve", "c.json", "--objective", "speed"])
    assert "Missing" in problem_of(["solve"])


def test_the_quick_start_without_hardware_runs_as_it_stands(tmp_path: Path) -> None:
    (block,) = [text for text in blocks(DOCS / "tasks" / "quick-start.md", "") if "cluster make" in text]
    for line in block.splitlines():
        command = [sys.executable, "-m", *shlex.split(line)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "report.html").is_file()


def test_every_command_has_a_page() -> None:
    assert {
        words[0] for page in (DOCS / "tasks").glob("*.md") for words in [*commands(page), *mentions(page)] if words
    } >= TOP


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if heading:
            slugs = [
                re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
                for title in re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            ]
            assert heading in slugs, target


def test_every_page_is_in_the_index() -> None:
    text = (DOCS / "index.md").read_text()
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"index.md"}
    assert pages - set(re.findall(r"\]\(([^)\s#]+)\)", text)) == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_modules_make_targets_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert [name for name in re.findall(r"python -m (benchmarks\.\w+)", text) if find_spec(name) is None] == []
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)) <= targets
    if page in CURRENT:
        paths = re.findall(r"(?<![\w./])(?:examples|benchmarks|tests|docs|solver|profiler)/[\w./-]*\w", text)
        assert [path for path in paths if not (page.parent / path).exists() and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_toml_of_a_page_is_read_by_the_program(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "toml"):
        tree = tomllib.loads(text)
        (tmp_path / tree.get("key", "unused")).touch(mode=0o600)
        if "node" in tree:
            read_testbed(tree, origin=name_of(page), folder=tmp_path)
        elif "case" in tree:
            folder = ROOT / "examples" / "suites"
            (tmp_path / "suite.toml").write_text(re.sub(r'= "(testbeds/|azure_)', rf'= "{folder}/\1', text))
            load_suite(tmp_path / "suite.toml")
        else:
            (tmp_path / "events.toml").write_text(text)
            load_events(tmp_path / "events.toml")


def lint(workflow: Path) -> int:
    """Exit code of check-jsonschema with the schema of GitHub workflows that it carries: no network."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(workflow)]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode


def test_workflows_are_valid() -> None:
    assert [path.name for path in [WORKFLOW, *(ROOT / ".github" / "workflows").glob("*.yml")] if lint(path)] == []


@pytest.mark.parametrize(
    ("right", "wrong"), [("runs-on: ubuntu-24.04", "run-on: ubuntu-24.04"), ("if: always()", "if: [always]")]
)
def test_the_linter_rejects_a_broken_workflow(right: str, wrong: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOW.read_text().replace(right, wrong, 1))

    assert broken.read_text() != WORKFLOW.read_text()
    assert lint(broken) == 1


def test_the_example_workflow_runs_commands_that_exist() -> None:
    text = re.sub(r">-\n\s+", "", WORKFLOW.read_text())
    lines = re.findall(r"run: (?:[\w-]+/bin/)?helixbench (.*(?:\n {10}\S.*)*)", text)
    found = [shlex.split(line) for line in lines]

    assert {words[0] for words in found} == {"solve", "gate"}
    assert [problem for words in found if (problem := problem_of(words))] == []
    (metric,) = [words[words.index("--metric") + 1] for words in found if "--metric" in words]
    assert metric in IS_HIGHER_BETTER
