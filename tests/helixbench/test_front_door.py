from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import typer

from helixbench.__main__ import COMMANDS, _mounted, app

FRONT_DOOR: Any = typer.main.get_command(app)


def test_every_command_that_a_package_mounts_is_listed() -> None:
    mounted = {name: module for module, _ in COMMANDS.values() for name in _mounted(module)}
    assert mounted == {name: module for name, (module, _) in COMMANDS.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_listed_line_is_the_commands_own(name: str) -> None:
    first = FRONT_DOOR.commands[name].help.split("\n\n")[0].replace("\n", " ").strip()
    assert COMMANDS[name][1] == first, "copy the first line of its help to helixbench/__main__.py"


def test_the_list_of_commands_imports_no_package() -> None:
    code = """
import json, sys
sys.argv = ["helixbench", "--help"]
from helixbench.__main__ import main
try:
    main()
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stderr)

    assert [name for name in COMMANDS if name not in done.stdout] == []
    assert [name for name in loaded if name.startswith("helixbench.") or name == "numpy"] == [
        "helixbench.__main__",
        "helixbench.errors",
    ]


def test_a_misspelt_command_is_answered_with_the_one_that_was_meant() -> None:
    done = subprocess.run([sys.executable, "-m", "helixbench", "solv"], capture_output=True, text=True)

    assert done.returncode == 2
    assert "Did you mean 'solve'?" in done.stderr
