from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("profiler", "solver", "reference_server", "reports")  # each may use those before it
FRONT_DOOR = "helixbench"

HEAVY = {
    "aiohttp",
    "fastapi",
    "highspy",
    "jinja2",
    "networkx",
    "prometheus_client",
    "pulp",
    "pynvml",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
    "uvicorn",
    "zmq",
}


def source_files() -> list[Path]:
    return [ROOT / f"{FRONT_DOOR}.py", *(path for package in ORDER for path in sorted((ROOT / package).rglob("*.py")))]


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of all that a file imports, wherever in it, relative imports made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: list[tuple[int, str]] = []
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            found += [(statement.lineno, alias.name) for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            base = package[: len(package) - statement.level + 1] if statement.level else ()
            module = ".".join([*base, *([statement.module] if statement.module else [])])
            found += [(statement.lineno, f"{module}.{alias.name}") for alias in statement.names]
    return found


def test_imports_point_one_way_only() -> None:
    wrong = []
    for path in source_files():
        own = path.relative_to(ROOT).parts[0]
        allowed = ORDER if own not in ORDER else ORDER[: ORDER.index(own) + 1]
        for line, name in imports_of(path):
            top = name.split(".")[0]
            if top in (*ORDER, FRONT_DOOR, "tests") and top not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_no_package_uses_anothers_private_names() -> None:
    wrong = []
    for path in source_files():
        own = path.relative_to(ROOT).parts[0]
        for line, name in imports_of(path):
            top, *rest = name.split(".")
            is_private = any(part.startswith("_") and not part.startswith("__") for part in rest)
            if top in ORDER and top != own and is_private:
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
    assert names == ["a.b", "c.d", "solver.deep.e", "solver.g.h", "i.j"]


def heavy_modules_after(code: str) -> set[str]:
    """Which of ``HEAVY`` a fresh interpreter has loaded after running ``code``."""
    tell = "import sys, json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return HEAVY & set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("module", [*ORDER, *(f"{package}.cli" for package in ORDER), "solver.plan"])
def test_importing_a_package_loads_nothing_heavy(module: str) -> None:
    assert heavy_modules_after(f"import {module}") == set()


@pytest.mark.parametrize("command", [[], ["solve"], ["profile"], ["profile", "measure"], ["serve"], ["report"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["helixbench", *{command!r}, "--help"]
import helixbench
try:
    helixbench.main()
except SystemExit as exit:
    assert exit.code == 0, exit.code
"""
    assert heavy_modules_after(code) == set()
