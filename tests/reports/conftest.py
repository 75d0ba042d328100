from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from helixbench.errors import HelixbenchError
from helixbench.records import encode_record
from helixbench.reports import cli


class CommandResult(msgspec.Struct, frozen=True):
    """What a shell would see of a command."""

    exit_code: int
    stdout: str
    stderr: str


Command = Callable[..., CommandResult]


@pytest.fixture
def command() -> Command:
    """Run a command of this package in process; errors end it as the front door ends it."""
    app = typer.Typer()
    cli.mount(app)

    def run(*arguments: str | Path) -> CommandResult:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})
        error = result.exception
        if isinstance(error, HelixbenchError):
            return CommandResult(error.exit_code, result.stdout, f"{result.stderr}helixbench: {error}\n")
        if error is not None and not isinstance(error, SystemExit):
            raise error
        return CommandResult(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def save(tmp_path: Path) -> Callable[[msgspec.Struct | bytes, str], Path]:
    """Write a record, or bytes as they are, to a file."""

    def write(content: msgspec.Struct | bytes, name: str) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else encode_record(content))
        return path

    return write
