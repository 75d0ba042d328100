"""What is installed is what lies in the repository, and what is imported is what is declared."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.distributions import ROOT, modules

PACKAGES = ("profiler", "solver", "reference_server", "reports")
PYTEST_PLUGIN = "reports/pytest_plugin.py"
"""Loaded by pytest alone, so pytest is there whenever it is imported."""
RUN_AS_TOOLS = {
    "check_jsonschema",
    "mypy",
    "pytest_timeout",
    "ruff",
    "scipy_stubs",
    "setuptools",
    "types_networkx",
    "pytest_xdist",
}
"""Development requirements that are run, loaded as plugins or read by mypy, not imported."""


def imported(folders: Iterable[str]) -> dict[str, str]:
    """Top-level third-party modules that the files under some folders import -> one of those files."""
    own = {"helixbench", "tests", "benchmarks"}
    found: dict[str, str] = {}
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(statement, ast.Import):
                names = [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
                names = [statement.module]
            for name in (name.split(".")[0] for name in names):
                if name not in sys.stdlib_module_names and name not in own:
                    found[name] = str(path.relative_to(ROOT))
    return found


def test_the_list_of_packages_holds_every_folder_with_code() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}

    assert listed == sorted({"helixbench", *(f"helixbench.{'.'.join(folder.parts)}" for folder in folders)})
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def test_the_product_imports_what_it_declares_and_nothing_else() -> None:
    found = imported(["helixbench", *PACKAGES])
    assert found.pop("pytest") == PYTEST_PLUGIN

    declared = modules("dependencies") | modules("serve")
    undeclared = {name: file for name, file in found.items() if name not in declared}
    assert undeclared == {}, "imported by the product, not among its dependencies or the extra `serve`"
    assert declared - set(found) == set(), "declared, imported nowhere"


def test_tests_and_benchmarks_import_what_the_development_extra_declares() -> None:
    development = modules("dev")
    found = imported(["tests", "benchmarks", "docs", "examples"])

    assert development >= RUN_AS_TOOLS
    declared = development | modules("dependencies") | modules("serve")
    undeclared = {name: file for name, file in found.items() if name not in declared}
    assert undeclared == {}, "imported by tests or benchmarks, not in the extra `dev`"
    assert development - set(found) == RUN_AS_TOOLS


def test_a_checkout_that_is_not_installed_runs(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import helixbench.solver.problem.plan as m; print(m.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert Path(done.stdout.strip()) == ROOT / "solver" / "problem" / "plan.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy: a build leaves files beside its sources."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in ("helixbench", *PACKAGES, "tests", "benchmarks"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, sources)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", out, sources]
    subprocess.run(command, check=True, timeout=200)
    (file,) = out.glob("helixbench-*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel: zipfile.ZipFile) -> None:
    paths = [path for name in ("helixbench", *PACKAGES) for path in (ROOT / name).rglob("*") if path.is_file()]
    files = [path.relative_to(ROOT) for path in paths if path.suffix != ".pyc"]
    built = {name for name in wheel.namelist() if ".dist-info/" not in name}

    assert built == {str(file if file.parts[0] == "helixbench" else "helixbench" / file) for file in files}
    assert {Path(name).suffix for name in built} >= {".py", ".j2", ".css", ".js", ".toml"}


def test_the_wheel_carries_licence_notice_command_and_plugin(wheel: zipfile.ZipFile) -> None:
    facts = [name for name in wheel.namelist() if ".dist-info/" in name]
    texts = {name.partition(".dist-info/")[2]: wheel.read(name).decode() for name in facts}

    assert texts["licenses/LICENSE"] == (ROOT / "LICENSE").read_text()
    assert texts["licenses/NOTICE"] == (ROOT / "NOTICE").read_text()
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert "helixbench = helixbench.__main__:main" in texts["entry_points.txt"]
    assert "[pytest11]\nhelixbench = helixbench.reports.pytest_plugin" in texts["entry_points.txt"]


def test_the_wheel_runs_from_a_folder_of_its_own(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = f"""
import importlib.util, sys
sys.path.insert(0, {str(tmp_path / "site")!r})
assert [name for name in {PACKAGES!r} if importlib.util.find_spec(name)] == []
sys.argv = ["helixbench", "--help"]
import helixbench.__main__
print(helixbench.__file__)
helixbench.__main__.main()
"""
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env={"PATH": "/nowhere"})

    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "solve" in done.stdout
