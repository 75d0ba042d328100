from __future__ import annotations

import ast
import functools
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("profiler", "solver", "reference_server", "reports")  # each may use those before it
SHARED = "helixbench"

# The files and folders of each package, in the order in which they may import each other.
ROOMS: dict[str, tuple[str, ...]] = {
    "helixbench": ("__init__", "errors", "units", "records", "progress", "interrupted", "options", "__main__"),
    "profiler": (
        *("cost", "cluster", "model", "stage", "device", "network", "measure", "import_tables", "staleness"),
        *("emulated_device", "machine", "cli", "__init__"),
    ),
    "solver": (
        *("problem", "flow", "scheduling", "simulation", "expected", "bounds", "placement", "questions"),
        *("cli", "__init__"),
    ),
    "reference_server": (
        *("run_log", "wire", "fitness", "testbed", "node", "coordinator", "simulation"),
        *("http", "profiling", "launch", "jobs"),
        *("doctor", "device_check", "commands", "cli", "__init__"),
    ),
    "reports": (
        *("verdict", "formatting", "loading", "compare", "render", "output", "gate", "suite", "served_plan"),
        *("demo", "schemas", "pytest_plugin", "cli", "__init__"),
    ),
}

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


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, wherever in it, those for type checkers only included."""
    modules = {module_of(path) for path in source_files()}
    graph: dict[str, set[str]] = {}
    for path in source_files():
        own = module_of(path)
        graph[own] = set()
        for _, name in imports_of(path):
            while name not in modules and "." in name:  # a name in a module, or a module
                name = name.rpartition(".")[0]
            graph[own] |= {name} & modules - {own}
    return graph


def room_of(module: str) -> tuple[str, str]:
    """Package, and file or folder in it."""
    parts = module.split(".")
    package, *inside = parts[1:] if len(parts) > 1 and parts[1] in ORDER else parts
    return package, inside[0] if inside else "__init__"


def test_imports_point_one_way_inside_each_package() -> None:
    graph = import_graph()
    unknown = {room for room in map(room_of, graph) if room[1] not in ROOMS[room[0]]}
    assert unknown == set(), "give these a place in ROOMS"
    wrong = []
    for module, imported in graph.items():
        package, room = room_of(module)
        for other in imported:
            other_package, other_room = room_of(other)
            if other_package == package and ROOMS[package].index(other_room) > ROOMS[package].index(room):
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        graphlib.TopologicalSorter(import_graph()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_point_one_way_only() -> None:
    wrong = []
    for path in source_files():
        own = layer_of(module_of(path))
        for line, name in imports_of(path):
            is_ours = name.split(".")[0] == SHARED
            if name.split(".")[0] in (*ORDER, "tests", "benchmarks") or (is_ours and layer_of(name) > own):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


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
