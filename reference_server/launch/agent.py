"""The process of one node: ``helixbench agent``, or ``python -m helixbench.reference_server.launch.agent``."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helixbench.errors import InputError
from helixbench.options import Cpus, DeviceMemory, Threads, memory_of_option

if TYPE_CHECKING:
    from helixbench.reference_server.node.agent import Agent, AgentConfig, Handler
    from helixbench.reference_server.profiling.links import IperfServers
    from helixbench.reference_server.wire.messages import Command, Profile, Profiled

_log = logging.getLogger(__name__)


def agent(
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 for any")] = "",
    key: Annotated[Path | None, typer.Option(help="the cluster's key file")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda:N")] = "cpu",
    memory: DeviceMemory = "",
    threads: Threads = None,
    cpus: Cpus = "",
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
    memory_bytes = memory_of_option(memory)
    from helixbench.reference_server.node.agent import AgentConfig
    from helixbench.reference_server.testbed.cpu import parse_cpus

    run_agent(
        AgentConfig(
            listen=listen, key=key, device=device, memory_bytes=memory_bytes, threads=threads, cpus=parse_cpus(cpus)
        )
    )


def run_agent(config: AgentConfig) -> None:
    """Serve until SIGTERM, Ctrl-C or a ``Shutdown``; once listening, print the address as one JSON line on stdout."""
    from helixbench.profiler.stage.stage import preload
    from helixbench.reference_server.node.agent import Agent, use_processors
    from helixbench.reference_server.profiling.links import IperfServers

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    use_processors(config)
    preload()
    servers = IperfServers()
    agent = Agent(config, profiling_handlers(servers))
    signal.signal(signal.SIGTERM, lambda *_: agent.stop())
    print(json.dumps({"listening": agent.address}), flush=True)
    try:
        agent.serve()
    except KeyboardInterrupt:
        _log.info("interrupted")
    finally:
        servers.close()
        agent.close()


def profiling_handlers(servers: IperfServers) -> Mapping[type[Command], Handler]:
    """Commands that profile a node and its links; ``servers`` are the node's own ends of iperf3."""
    from helixbench.reference_server.profiling.links import measure_flows, measure_link
    from helixbench.reference_server.wire.messages import IperfServe, MeasureFlows, MeasureLink, Profile

    return {
        Profile: _profile,
        IperfServe: lambda _, command: servers.serve(command.count),
        MeasureLink: lambda agent, command: measure_link(agent.transport, command),
        MeasureFlows: lambda _, command: measure_flows(command),
    }


def _profile(agent: Agent, command: Profile) -> Profiled:
    from helixbench.reference_server.profiling.node import profile  # loads torch

    return profile(agent, command)


if __name__ == "__main__":
    typer.run(agent)
