"""The command ``agent``: run the agent of one node, or write a cluster key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from helixbench.errors import InputError
from helixbench.options import Cpus, DeviceMemory, Threads, memory_of_option


def agent(
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 for any")] = "",
    key: Annotated[Path | None, typer.Option(help="the cluster's key file")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda:N")] = "cpu",
    memory: DeviceMemory = "",
    threads: Threads = None,
    cpus: Cpus = "",
    emulate: Annotated[Path | None, typer.Option(help="device file whose times the agent keeps")] = None,
    time_scale: Annotated[
        float, typer.Option(min=1e-3, help="with --emulate: seconds here that stand for one of that device's")
    ] = 1.0,
    make_key: Annotated[Path | None, typer.Option(help="write a new cluster key there and exit")] = None,
) -> None:
    """Run the agent of one node, to be profiled and to serve."""
    from helixbench.reference_server.wire.keys import make_key_file
    from helixbench.reference_server.wire.transport import require_listen

    if make_key is not None:
        make_key_file(make_key)
        print(f"{make_key}: a new cluster key; copy it to every node")
        return
    if not listen or key is None:
        raise InputError("agent: need --listen HOST:PORT and --key FILE (make one with --make-key FILE)")
    require_listen(listen)
    if time_scale != 1 and emulate is None:
        raise InputError(f"--time-scale {time_scale:g}: goes with --emulate")
    memory_bytes = memory_of_option(memory)
    from helixbench.reference_server.launch.agent import run_agent
    from helixbench.reference_server.node.agent import AgentConfig
    from helixbench.reference_server.testbed.cpu import parse_cpus

    run_agent(
        AgentConfig(
            listen=listen,
            key=key,
            device=device,
            memory_bytes=memory_bytes,
            threads=threads,
            cpus=parse_cpus(cpus),
            emulate=emulate,
            time_scale=time_scale,
        )
    )
