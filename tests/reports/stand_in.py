"""A ``helixbench`` whose command is a program of the test, and whose modules are the real ones."""

from __future__ import annotations

from pathlib import Path

import helixbench


def write_stand_in(folder: Path, program: str) -> None:
    """With ``folder`` first in PYTHONPATH, ``python -m helixbench`` runs ``program``."""
    package = folder / "helixbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__path__ += {list(helixbench.__path__)!r}\n")
    (package / "__main__.py").write_text(program)
