"""Front door: ``helixbench <command>``. Imports the package of one command only, and ends it with its exit code."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from helixbench.errors import HelixbenchError

REPORTS = "helixbench.reports.cli"
SERVER = "helixbench.reference_server.cli"
SIMULATION = "helixbench.reference_server.simulation.cli"
SOLVER = "helixbench.solver.cli"

# Command -> the module whose ``mount`` registers it, and the first line of its help. The lines stand here a second time
# so that `helixbench --help` imports none of those modules; a test compares them.
COMMANDS = {
    "model": (SERVER, "Make models to try things with."),
    "profile": (SERVER, "Profile nodes and links into a cluster profile."),
    "cluster": (SERVER, "Synthetic clusters, devices to emulate, and the nodes of a running server."),
    "solve": (
        SOLVER,
        "Plan a model onto a cluster: the best placement found, a proven bound, and the expected throughput.",
    ),
    "simulate": (
        SIMULATION,
        "Serve a plan on a virtual clock, with the server's rules and the profile's times.",
    ),
    "agent": (SERVER, "Run the agent of one node, to be profiled and to serve."),
    "doctor": (
        SERVER,
        "Check whether nodes are fit to be profiled and to serve. Exit code 1 where there is a problem.",
    ),
    "bench": (SERVER, "Run a plan under load, closed or open loop, and write what was measured."),
    "check": (
        SERVER,
        "Judge what clients saw in a run: tokens lost, duplicated or wrong. Exit code 0 where there are none, else 1.",
    ),
    "serve": (SERVER, "Serve a plan over an OpenAI-compatible HTTP API."),
    "report": (REPORTS, "Show a run beside its plan's prediction, or a plan or a cluster."),
    "compare": (REPORTS, "Compare two runs, two plans or two clusters; changes are judged against the noise."),
    "gate": (
        REPORTS,
        "Gate a run on its plan (`gate RUN`), or NEW on BASE. "
        "Exit 0 pass, 1 fail, 2 invalid input, 3 could not measure, 4 undecided with --strict.",
    ),
    "validate": (REPORTS, "Compare measured with predicted performance on many testbeds and workloads."),
    "demo": (REPORTS, "Profile, solve, serve the plan and two baselines under load, and report; on this machine."),
    "schema": (REPORTS, "Print the JSON Schema of a record."),
}


class _Commands(Mapping[str, Any]):
    """Command by name; the module that has it is imported when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        return _mounted(COMMANDS[name][0])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


@functools.cache
def _mounted(module: str) -> Mapping[str, Any]:
    """The commands that a module registers."""
    part = typer.Typer()
    part.callback()(lambda: None)
    import_module(module).mount(part)
    commands: Mapping[str, Any] = typer.main.get_command(part).commands  # type: ignore[attr-defined]
    return commands


class FrontDoor(TyperGroup):
    """All commands, listed in the order of ``COMMANDS``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"commands": _Commands()})

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The list of commands, from their first lines alone."""
        listed: dict[str, Any] = {name: TyperCommand(name, help=line) for name, (_, line) in COMMANDS.items()}
        TyperGroup(name=self.name, help=self.help, commands=listed, params=self.params).format_help(ctx, formatter)


app = typer.Typer(cls=FrontDoor, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def helixbench() -> None:
    """Profile a heterogeneous cluster, plan a model onto it with a proven bound, serve it, and check the prediction."""


def main() -> None:
    """Run a command; an error that a user can cause is one message and an exit code."""
    try:
        app()
    except HelixbenchError as error:
        print(f"helixbench: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
