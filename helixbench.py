"""Front door: ``helixbench <command>``. Mounts each package's commands and ends each with its exit code."""

from __future__ import annotations

import sys

import typer

import reference_server.cli
import reference_server.simulation.cli
import reports.cli
import solver.cli
from profiler.errors import HelixbenchError

app = typer.Typer(
    help="Profile a mixed cluster, place a model on it with a proven bound, serve it, and check the prediction.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for package in (reports.cli, reference_server.cli, reference_server.simulation.cli, solver.cli):
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
