"""The command ``doctor``: is this machine, or a cluster of agents, fit to be profiled and to serve?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from helixbench.errors import InputError
from helixbench.options import AsJson, print_record
from helixbench.reference_server.commands.nodes import AgentsKey, RunningAgents, agent_addresses

if TYPE_CHECKING:
    from rich.console import Console

    from helixbench.reference_server.doctor import Diagnosis


def doctor(
    agent: RunningAgents = None,
    key: AgentsKey = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT for an agent on this machine: is it free?")] = "",
    as_json: AsJson = False,
) -> None:
    """Check whether nodes are fit to be profiled and to serve. Exit code 1 where there is a problem."""
    import msgspec

    from helixbench.records import provenance_now
    from helixbench.reference_server.doctor import diagnose_agents, diagnose_here
    from helixbench.reference_server.wire.transport import require_listen

    if agent and listen:
        raise InputError("--listen is for this machine, --agent for others: give one of them")
    if agent:
        if key is None:
            raise InputError("--agent: give --key FILE with it")
        found = diagnose_agents(agent_addresses(agent), key)
    else:
        if listen:
            require_listen(listen)
        found = diagnose_here(listen)
    if as_json:
        print_record(msgspec.structs.replace(found, provenance=provenance_now()))
    else:
        from rich.console import Console

        _show(found, Console())
    if found.count("problem"):
        raise typer.Exit(1)


def _show(found: Diagnosis, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]PROBLEM[/]"}
    for node, findings in found.findings.items():
        host = f" ({found.facts[node].machine.get('host', '')})" if node in found.facts else ""
        table = Table(title=f"{node}{host}", title_justify="left", box=None, padding=(0, 1, 0, 0), show_header=False)
        for can_wrap in (False, False, True):
            table.add_column(no_wrap=not can_wrap)
        for finding in findings:
            remedy = f"\n[dim]-> {escape(finding.remedy)}[/]" if finding.remedy else ""
            table.add_row(marks[finding.state], finding.check, escape(finding.says) + remedy)
        console.print(table, highlight=False)
    console.print(f"{found.count('problem')} problems, {found.count('warning')} warnings")
