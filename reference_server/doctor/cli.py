"""``helixbench doctor``: is this machine, or a cluster of agents, fit to be measured and to serve?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from helixbench.errors import InputError
from helixbench.reference_server.wire.address import require_address, require_listen

if TYPE_CHECKING:
    from rich.console import Console

    from helixbench.reference_server.doctor.doctor import Diagnosis

_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]PROBLEM[/]"}


def doctor(
    agent: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads it
        typer.Option("--agent", help="NAME=HOST:PORT of an agent to examine; once for each, with --key."),
    ] = None,
    key: Annotated[Optional[Path], typer.Option("--key", help="The key that those agents were started with.")] = None,  # noqa: UP045
    listen: Annotated[str, typer.Option(help="HOST:PORT that an agent is to listen on here: is it free?")] = "",
    json_: Annotated[bool, typer.Option("--json", help="Print the record on stdout.")] = False,
) -> None:
    """Check a node: driver, clocks, iperf3, ports, time, permissions. Exit code 1 where there is a problem."""
    import msgspec

    from helixbench.records import encode_record, provenance_now
    from helixbench.reference_server.doctor.doctor import diagnose_agents, diagnose_here

    if agent and listen:
        raise InputError("--listen is of this machine, --agent of others: give one of them")
    if agent:
        if key is None:
            raise InputError("--agent: give --key FILE with it")
        found = diagnose_agents(parse_agents(agent), key)
    else:
        if listen:
            require_listen(listen)
        found = diagnose_here(listen)
    if json_:
        record = msgspec.structs.replace(found, provenance=provenance_now())
        sys.stdout.write(encode_record(record).decode())
    else:
        from rich.console import Console

        _show(found, Console())
    if found.num_problems:
        raise typer.Exit(1)


def parse_agents(texts: list[str]) -> dict[str, str]:
    """Node -> address, out of ``NAME=HOST:PORT`` texts.

    Raises:
        InputError: another form, or one name twice.
    """
    addresses: dict[str, str] = {}
    for text in texts:
        name, _, address = text.partition("=")
        if not name or ":" not in address:
            raise InputError(f"--agent {text}: need NAME=HOST:PORT")
        try:
            require_address(address)
        except ValueError as error:
            raise InputError(f"--agent {text}: {error}") from error
        if name in addresses:
            raise InputError(f"--agent {text}: {name} stands twice; names must differ")
        addresses[name] = address
    return addresses


def _show(found: Diagnosis, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    for node, findings in found.findings.items():
        host = f" ({found.facts[node].host})" if node in found.facts else ""
        table = Table(title=f"{node}{host}", title_justify="left", box=None, padding=(0, 1, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        for finding in findings:
            remedy = f"\n[dim]-> {escape(finding.remedy)}[/]" if finding.remedy else ""
            table.add_row(_MARKS[finding.state], finding.check, escape(finding.says) + remedy)
        console.print(table, highlight=False)
    counts = [
        (state, sum(finding.state == state for own in found.findings.values() for finding in own))
        for state in ("problem", "warning")
    ]
    console.print(", ".join(f"{number} {state}{'' if number == 1 else 's'}" for state, number in counts))
