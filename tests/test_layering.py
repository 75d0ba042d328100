from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("profiler", "solver", "reference_server", "reports")  # each may use those before it
SHARED = "helixbench"

HEAVY = {
    "highspy",
    "jinja2",
    "networkx",
    "prometheus_client",
    "pulp",
    "pynvml",
    "safetensors",
    "scipy",
    "starlette",
    "tokenizers",
    "torch",
    "transformers",
    "uvicorn",
    "zmq",
}


def source_files() -> list[Path]:
    return sorted(path for folder in (SHARED, *ORDER) for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    """Dotted name that a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == SHARED else (SHARED, *parts))
    return name.removesuffix(".__init__")


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of all that a file imports, wherever in it, relative imports made absolute."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: list[tuple[int, str]] = []
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            found += [(statement.lineno, alias.name) for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            base = package[: len(package) - statement.level + 1] if statement.level else []
            module = ".".join([*base, *([statement.module] if statement.module else [])])
            found += [(statement.lineno, f"{module}.{alias.name}") for alias in statement.names]
    return found


def layer_of(name: str) -> int:
    """Place of a module in the order of imports; the front door comes last, the shared ground first."""
    parts = name.split(".")
    if parts[:2] == [SHARED, "__main__"]:
        return len(ORDER) + 1
    return 1 + ORDER.index(parts[1]) if len(parts) > 1 and parts[1] in ORDER else 0


def test_imports_point_one_way_only() -> None:
    wrong = []
    for path in source_files():
        own = layer_of(module_of(path))
        for line, name in imports_of(path):
            is_ours = name.split(".")[0] == SHARED
            if name.split(".")[0] in (*ORDER, "tests", "benchmarks") or (is_ours and layer_of(name) > own):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


# Inside a package: each room may use those before it. A module that is no room of its own counts by its name.
ROOMS = {
    "reference_server": (
        *("run_log", "wire", "fitness", "testbed", "node", "coordinator", "http", "profiling", "launch", "jobs"),
        *("doctor", "commands", "simulation", "cli"),
    )
}


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_of_a_package_point_one_way_only(package: str) -> None:
    rooms = ROOMS[package]
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        own = module_of(path).split(".")[2:3]
        for line, name in imports_of(path):
            used = name.split(".")[2:3] if name.startswith(f"{SHARED}.{package}.") else []
            if own and used and rooms.index(used[0]) > rooms.index(own[0]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {module_of(path): path for path in source_files()}
    graph = nx.DiGraph()
    for module, path in modules.items():
        for _, name in imports_of(path):
            used = next((part for part in (name, name.rpartition(".")[0]) if part in modules), module)
            graph.add_edge(module, used)
    circles = [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1]
    assert circles == []


def test_no_package_uses_anothers_private_names() -> None:
    wrong = []
    for path in source_files():
        for line, name in imports_of(path):
            is_private = any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
            if name.split(".")[0] == SHARED and layer_of(name) != layer_of(module_of(path)) and is_private:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_the_check_sees_imports_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "solver" / "deep").mkdir(parents=True)
    path = tmp_path / "solver" / "deep" / "file.py"
    path.write_text(
        "import a.b\ndef f():\n    from c import d\nfrom . import e\nfrom ..g import h\nfrom ...i import j\n"
    )
    names = [name for _, name in sorted(imports_of(path))]
    assert names == ["a.b", "c.d", "helixbench.solver.deep.e", "helixbench.solver.g.h", "helixbench.i.j"]


def heavy_modules_after(code: str) -> set[str]:
    """Which of ``HEAVY`` a fresh interpreter has loaded after running ``code``."""
    tell = "import sys, json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return HEAVY & set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("module", [*ORDER, *(f"{package}.cli" for package in ORDER), "helixbench.solver.problem.plan"])
def test_importing_a_package_loads_nothing_heavy(module: str) -> None:
    assert heavy_modules_after(f"import helixbench.{module}") == set()


@pytest.mark.parametrize("command", [[], ["solve"], ["profile"], ["profile", "import"], ["serve"], ["report"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["helixbench", *{command!r}, "--help"]
from helixbench.__main__ import main
try:
    main()
except SystemExit as exit:
    assert exit.code == 0, exit.code
"""
    assert heavy_modules_after(code) == set()
