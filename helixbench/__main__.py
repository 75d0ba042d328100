"""Front door: ``helixbench <command>``. Mounts each package's commands and ends each with its exit code."""

from __future__ import annotations

import sys

import typer

from helixbench.errors import HelixbenchError
from helixbench.reference_server import cli as server_commands
from helixbench.reference_server.simulation import cli as simulation_commands
from helixbench.reports import cli as report_commands
from helixbench.solver import cli as solver_commands

app = typer.Typer(
    help="Profile a mixed cluster, place a model on it with a proven bound, serve it, and check the prediction.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for package in (report_commands, server_commands, simulation_commands, solver_commands):
    package.mount(app)


def main() -> None:
    """Run a command; an error that a user can cause is one message and an exit code."""
    try:
        app()
    except HelixbenchError as error:
        print(f"helixbench: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
