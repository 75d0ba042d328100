"""Options that name the nodes of a command, and the job that it runs on them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helixbench.errors import InputError
from helixbench.options import note

if TYPE_CHECKING:
    from helixbench.reference_server.coordinator.live_events import Rig
    from helixbench.reference_server.coordinator.options import AdaptOptions
    from helixbench.reference_server.jobs.job import Job
    from helixbench.reference_server.testbed.spec import TestbedSpec
    from helixbench.reference_server.testbed.testbed import Testbed

TestbedFile = Annotated[
    Path | None,
    typer.Option("--testbed", help="testbed TOML, or the name of one that comes with helixbench; default: two-cpus"),
]
RunningAgents = Annotated[
    list[str] | None, typer.Option("--agent", help="NAME=HOST:PORT of a running agent, repeated for each; with --key")
]
AllowStale = Annotated[
    bool, typer.Option("--allow-stale", help="also where the profile was made on another device, version or model")
]
OUTAGE_S = 60.0
MACHINE_REPLAY_BYTES = 1 << 32  # of all nodes that a testbed starts on this machine
TakeOver = Annotated[bool, typer.Option("--take-over", help="take agents from a run that they serve")]
OutageS = Annotated[
    float,
    typer.Option("--outage-s", min=0.0, help="how long requests wait for nodes that cover the model again"),
]
ReplayMemory = Annotated[
    str,
    typer.Option(
        "--replay-memory",
        help="host memory of each node for states that it sent, like 1GB; 0 for none "
        "[default: 1GiB, or a share of 4GiB for the nodes of one machine]",
    ),
]
NoReflow = Annotated[
    bool, typer.Option("--no-reflow", help="keep the planned weights, whatever the nodes' measured times are")
]
NoReplan = Annotated[
    bool, typer.Option("--no-replan", help="do not move layers where the nodes that are left do not cover the model")
]
EventsFile = Annotated[Path | None, typer.Option("--events", help="TOML or JSON file of what is to happen")]
AgentsKey = Annotated[Path | None, typer.Option("--key", help="the key that those agents were started with")]


def adapt_options(
    spec: TestbedSpec, *, take_over: bool, outage_s: float, replay_memory: str, no_reflow: bool, no_replan: bool
) -> AdaptOptions:
    """How the plan is adapted on the nodes of a testbed.

    Raises:
        InputError: no amount of memory.
    """
    from helixbench.reference_server.coordinator.options import AdaptOptions
    from helixbench.solver.scheduling.recover import REPLAY_MEMORY_BYTES
    from helixbench.units import parse_bytes

    replay_bytes: float = min(REPLAY_MEMORY_BYTES, MACHINE_REPLAY_BYTES // max(1, len(spec.local_nodes)))
    try:
        if replay_memory:
            replay_bytes = 0.0 if replay_memory == "0" else parse_bytes(replay_memory)
    except ValueError as error:
        raise InputError(f"--replay-memory {replay_memory}: {error}") from error
    return AdaptOptions(
        reflows=not no_reflow,
        replans=not no_replan,
        outage_s=outage_s,
        replay_memory_bytes=int(replay_bytes),
        take_over=take_over,
    )


def rig_of(bed: Testbed) -> Rig:
    """What events act on, of a testbed that is running."""
    from helixbench.reference_server.coordinator.live_events import LocalProcess, Rig

    agents = {
        name: LocalProcess(
            pid=agent.process.pid,
            place=agent.place,
            argv=agent.argv_at(bed.addresses[name]),
            log=agent.log.resolve(),
        )
        for name, agent in bed.agents.items()
    }
    return Rig(agents=agents, stations=dict(bed.stations), emulated=bed.emulated)


def nodes_of_options(testbed: Path | None, agents: list[str] | None, key: Path | None) -> TestbedSpec:
    """The testbed of a file, of agents that run already, or of two nodes on this machine's CPU.

    Raises:
        InputError: options that exclude each other, or an invalid testbed.
    """
    from helixbench.reference_server.testbed.spec import MACHINES_OWN, load_testbed, testbed_from_tree

    if not agents:
        if key is not None:
            raise InputError("--key: belongs to --agent NAME=HOST:PORT; a testbed file names its key itself")
        return load_testbed(testbed or Path(MACHINES_OWN))
    if testbed is not None or key is None:
        raise InputError("--agent: give --key FILE with it, and no --testbed")
    nodes = [{"name": name, "address": address} for name, address in agent_addresses(agents).items()]
    return testbed_from_tree({"node": nodes, "key": str(key.resolve())}, origin="--agent", folder=Path.cwd())


def agent_addresses(texts: list[str]) -> dict[str, str]:
    """Node -> address, from ``NAME=HOST:PORT`` texts.

    Raises:
        InputError: another form, or a duplicate name.
    """
    from helixbench.reference_server.wire.transport import require_address

    addresses: dict[str, str] = {}
    for text in texts:
        name, _, address = text.partition("=")
        try:
            require_address(address)
        except ValueError as error:
            raise InputError(f"--agent {text}: need NAME=HOST:PORT ({error})") from error
        if not name or name in addresses:
            raise InputError(f"--agent {text}: {'duplicate name ' + repr(name) if name else 'need NAME=HOST:PORT'}")
        addresses[name] = address
    return addresses


def run_job(
    spec: TestbedSpec, job_of: Callable[[Testbed], Job], *, log_dir: Path, pass_fds: tuple[int, ...] = ()
) -> None:
    """Start the testbed and let its driver do the job; exit with the driver's code unless that is 0."""
    from helixbench.reference_server.jobs.job import encode_job
    from helixbench.reference_server.testbed.testbed import start_testbed

    with start_testbed(spec, log_dir=log_dir) as bed, tempfile.TemporaryFile() as file:
        note(f"  testbed: {bed.description}")
        file.write(encode_job(job_of(bed)))
        file.flush()
        # Without a name, so that nothing is left of it whatever ends this process.
        driver = [sys.executable, "-m", "helixbench.reference_server.jobs.driver", f"/dev/fd/{file.fileno()}"]
        code = bed.run_driver(driver, (*pass_fds, file.fileno()))
        if code != 0:
            bed.check()
            raise typer.Exit(code)


def show_written(output: Path, *, as_json: bool) -> None:
    """The record that a job wrote, or where it is."""
    if as_json:
        sys.stdout.write(output.read_text(encoding="utf-8"))
    else:
        print(f"{output} written; see it with: helixbench report {output}")


def logs_beside(output: Path) -> Path:
    """Folder of the agents' logs."""
    return output.resolve().parent / "logs"
