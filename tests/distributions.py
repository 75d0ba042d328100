"""Which distributions pyproject.toml declares, and which module each provides."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULE_OF = {"nvidia-ml-py": "pynvml", "pyzmq": "zmq"}
"""Modules named otherwise than their distribution."""


def project() -> dict[str, dict[str, list[str]]]:
    """Requirements by extra: those of the bare installation are ``dependencies``."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"dependencies": table["dependencies"], **table["optional-dependencies"]}


def modules(extra: str) -> set[str]:
    """Top-level modules that an extra installs by name; another extra of this project in it counts as none."""
    names = {re.split(r"[<>=!~\[ ]", requirement)[0] for requirement in project()[extra]} - {"helixbench"}
    return {MODULE_OF.get(name, name.replace("-", "_")) for name in names}
