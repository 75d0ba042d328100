"""The process of one node: ``python -m helixbench.reference_server.launch.agent``, as testbeds start it.

It loads neither torch nor what the command line is made of: 24 of them start on a laptop.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from helixbench.errors import HelixbenchError
from helixbench.reference_server.node.agent import Agent, AgentConfig, Handler
from helixbench.reference_server.profiling.emulated import profile_emulated
from helixbench.reference_server.profiling.links import IperfServers, measure_flows, measure_link
from helixbench.reference_server.testbed.cpu import parse_cpus, use_cpus
from helixbench.reference_server.testbed.emulation import EmulatedNode
from helixbench.reference_server.wire.messages import (
    Command,
    IperfServe,
    MeasureFlows,
    MeasureLink,
    Profile,
    Profiled,
)

_log = logging.getLogger(__name__)


def run_agent(config: AgentConfig) -> None:
    """Serve until SIGTERM (which lets requests end first), Ctrl-C or a ``Shutdown``.

    Once listening, print the address as one JSON line on stdout.

    Raises:
        InputError: a device, core, key or address that is not there.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    use_cpus(config.cpus)
    servers = IperfServers()
    agent = Agent(config, profiling_handlers(servers))
    signal.signal(signal.SIGTERM, lambda *_: agent.leave())
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
    return {
        Profile: _profile,
        IperfServe: lambda _, command: servers.serve(command.count),
        MeasureLink: lambda agent, command: measure_link(agent.transport, command),
        MeasureFlows: lambda _, command: measure_flows(command),
    }


def _profile(agent: Agent, command: Profile) -> Profiled:
    if isinstance(agent.hold, EmulatedNode):
        return profile_emulated(agent, agent.hold, command)
    from helixbench.reference_server.profiling.node import profile  # loads torch

    return profile(agent, command)


def main(arguments: list[str]) -> int:
    """Run an agent; returns the exit code. For people there is ``helixbench agent``."""
    parser = argparse.ArgumentParser(prog="agent")
    parser.add_argument("--listen", required=True)
    parser.add_argument("--key", required=True, type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=float, help="bytes")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpus", default="")
    parser.add_argument("--emulate", type=Path, help="device file")
    parser.add_argument("--time-scale", type=float, default=1.0)
    given = parser.parse_args(arguments)
    try:
        config = AgentConfig(
            listen=given.listen,
            key=given.key,
            device=given.device,
            memory_bytes=given.memory,
            threads=given.threads,
            cpus=parse_cpus(given.cpus),
            emulate=given.emulate,
            time_scale=given.time_scale,
        )
        run_agent(config)
    except HelixbenchError as error:
        print(f"helixbench: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
