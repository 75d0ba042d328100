"""The command ``doctor``: is this machine, or a cluster of agents, fit to be profiled and to serve?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helixbench.errors import InputError
from helixbench.options import AsJson, print_record
from helixbench.reference_server.commands.nodes import AgentsKey, RunningAgents, agent_addresses

if TYPE_CHECKING:
    from rich.console import Console

    from helixbench.reference_server.device_check.record import DeviceCheck
    from helixbench.reference_server.doctor import Diagnosis


def doctor(
    agent: RunningAgents = None,
    key: AgentsKey = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT for an agent on this machine: is it free?")] = "",
    gpu_check: Annotated[
        bool, typer.Option("--gpu-check", help="compute, time and serve on a device, some minutes long")
    ] = False,
    device: Annotated[str, typer.Option(help="of --gpu-check: cuda:0, cpu; the first GPU if there is one")] = "",
    only: Annotated[
        list[str] | None, typer.Option(metavar="STEP", help="of --gpu-check: this step; repeatable")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="of --gpu-check: write what was found after each step")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check whether nodes are fit to be profiled and to serve. Exit code 1 where there is a problem."""
    import msgspec

    from helixbench.records import provenance_now
    from helixbench.reference_server.doctor import diagnose_agents, diagnose_here
    from helixbench.reference_server.wire.transport import require_listen

    if gpu_check:
        if agent or listen:
            raise InputError("--gpu-check is of a device of this machine: leave out --agent and --listen")
        _check_device(device, only or [], output, as_json=as_json)
        return
    if device or only or output:
        raise InputError("--device, --only and --output belong to --gpu-check")
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


def _check_device(device: str, only: list[str], output: Path | None, *, as_json: bool) -> None:
    from rich.console import Console

    from helixbench.interrupted import EXIT_CODE
    from helixbench.profiler.device import describe_device
    from helixbench.records import require_writable, save_record
    from helixbench.reference_server.device_check.run import check_device

    if not device:
        import torch

        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    describe_device(device)  # refused here where there is none
    if output is not None:
        require_writable(output)
    console = Console(stderr=as_json)
    known: list[DeviceCheck] = []

    def on_step(found: DeviceCheck) -> None:
        known[:] = [found]
        if output is not None:
            save_record(output, found)
        step = next(step for step in reversed(found.steps) if step.status != "not run")
        style = "green" if step.status == "pass" else "red"
        console.print(f"[{style}]{step.status.upper():9}[/] {step.name:9} {step.seconds:6.1f} s  ", end="")
        console.print(step.says, markup=False, highlight=False)

    try:
        with console.status("") as status:
            check_device(device, only=only, on_begin=lambda name: status.update(f"{name} …"), on_step=on_step)
    except KeyboardInterrupt:
        console.print("interrupted; the steps that had ended are kept" if known else "interrupted")
        raise typer.Exit(EXIT_CODE) from None
    (found,) = known
    if as_json:
        print_record(found)
    seconds = sum(step.seconds for step in found.steps)
    passed = sum(step.status == "pass" for step in found.steps)
    console.print(f"{device}: {passed} of {len(found.steps)} steps passed in {seconds:.0f} s")
    if not found.is_good:
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
