"""What is installed is what lies in the repository."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("profiler", "solver", "reference_server", "reports")


def test_the_list_of_packages_holds_every_folder_with_code() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}

    assert listed == sorted({"helixbench", *(f"helixbench.{'.'.join(folder.parts)}" for folder in folders)})
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def test_a_checkout_that_is_not_installed_runs(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import helixbench.solver.problem.plan as m; print(m.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert Path(done.stdout.strip()) == ROOT / "solver" / "problem" / "plan.py"
