"""Events of a file, made to happen to the processes and links of a testbed while it serves."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import msgspec

from helixbench.errors import InputError, MeasurementError
from helixbench.profiler.cluster import COORDINATOR
from helixbench.reference_server.run_log import Happened
from helixbench.reference_server.testbed.namespaces import Station, cut, heal, set_rate
from helixbench.reference_server.testbed.process import Place
from helixbench.solver.simulation.events import (
    Event,
    LinkChanges,
    LinkCut,
    LinkEvent,
    LinkHeals,
    NodeDies,
    NodeDrains,
    NodeFreezes,
    NodeJoins,
    NodeResumes,
    NodeSlows,
    place_of,
    what_of,
)


class LocalProcess(msgspec.Struct, frozen=True, kw_only=True):
    """An agent of the testbed: its process, where it runs, and the command line that starts another one there."""

    pid: int
    place: Place
    argv: tuple[str, ...]
    log: Path


class Rig(msgspec.Struct, frozen=True, kw_only=True):
    """What events act on.

    Attributes:
        agents: node -> its process, of the agents that were started here.
        stations: member -> its place on the network; empty where members share this machine's.
        emulated: nodes whose speed can be set.
    """

    agents: dict[str, LocalProcess] = {}
    stations: dict[str, Station] = {}
    emulated: tuple[str, ...] = ()


def require_possible(events: Sequence[Event], rig: Rig, nodes: Collection[str], *, where: str) -> None:
    """Check that each event can be made to happen, before anything runs.

    Raises:
        InputError: naming the event and what is missing.
    """
    for event in events:
        at = f"{where}: {what_of(event)} at {event.at_s:g} s"
        if isinstance(event, LinkEvent):
            _require_link(event, rig, at)
        elif event.node not in nodes:
            raise InputError(f"{at}: there is no such node (there are {', '.join(nodes)})")
        elif isinstance(event, NodeSlows) and event.node not in rig.emulated:
            raise InputError(f"{at}: only an emulated device can be slowed down, and {event.node} is a real one")
        elif isinstance(event, NodeDies | NodeFreezes | NodeResumes | NodeJoins) and event.node not in rig.agents:
            raise InputError(f"{at}: its agent was not started here, so it cannot be reached by signals")


def _require_link(event: LinkEvent, rig: Rig, at: str) -> None:
    if not rig.stations:
        raise InputError(f"{at}: links can be changed where nodes have network namespaces, which needs root")
    for name in (event.src, event.dst):
        if name not in rig.stations:
            raise InputError(f"{at}: {name} is not on this machine's network")
    if COORDINATOR in (event.src, event.dst):
        raise InputError(f"{at}: only links between nodes can be changed")
    if isinstance(event, LinkChanges) and rig.stations[event.dst].address not in (
        rig.stations[event.src].peer_bytes_per_s
    ):
        raise InputError(f"{at}: the testbed file gives this link no bandwidth of its own; add a [[link]]")


class LiveEvents:
    """Makes events happen when their time has come.

    Args:
        events: by time.
        rig: what they act on.
        set_speed: sets the speed of a node's emulated device.
        drain: has a node take no more requests.

    Attributes:
        happened: what was done, and when.
    """

    def __init__(
        self,
        events: Sequence[Event],
        rig: Rig,
        *,
        set_speed: Callable[[str, float], None],
        drain: Callable[[str], None],
    ) -> None:
        self._to_come = list(events)
        self._rig = rig
        self._set_speed, self._drain = set_speed, drain
        self._pids = {node: agent.pid for node, agent in rig.agents.items()}
        self._started: list[subprocess.Popen[bytes]] = []
        self.happened: list[Happened] = []

    def tick(self, now_s: float) -> None:
        """Make happen what is due by now, seconds since the load began.

        Raises:
            MeasurementError: a process or a link could not be changed.
        """
        while self._to_come and self._to_come[0].at_s <= now_s:
            event = self._to_come.pop(0)
            self._make_happen(event)
            node, peer = place_of(event)
            kind, factor = str(event.__struct_config__.tag), None
            if isinstance(event, NodeSlows | LinkChanges):
                factor = event.factor
            self.happened.append(Happened(at_s=now_s, kind=kind, node=node, peer=peer, factor=factor))

    def end(self) -> None:
        """End the agents that were started here, and let frozen ones go on."""
        for process in self._started:
            process.kill()
            process.wait()

    def _make_happen(self, event: Event) -> None:
        if isinstance(event, NodeSlows):
            self._set_speed(event.node, event.factor)
        elif isinstance(event, NodeFreezes):
            self._signal(event.node, signal.SIGSTOP)
        elif isinstance(event, NodeResumes):
            self._signal(event.node, signal.SIGCONT)
        elif isinstance(event, NodeDies):
            self._signal(event.node, signal.SIGKILL)
        elif isinstance(event, NodeDrains):
            self._drain(event.node)
        elif isinstance(event, NodeJoins):
            self._start(event.node)
        else:
            station, address = self._rig.stations[event.src], self._rig.stations[event.dst].address
            if isinstance(event, LinkCut):
                cut(station, address)
            elif isinstance(event, LinkHeals):
                heal(station, address)
            else:
                set_rate(station, address, event.factor)

    def _signal(self, node: str, number: signal.Signals) -> None:
        try:
            os.kill(self._pids[node], number)
        except ProcessLookupError as error:
            raise MeasurementError(f"node {node}: its agent had ended before it could be sent {number.name}") from error

    def _start(self, node: str) -> None:
        agent = self._rig.agents[node]
        with agent.log.open("ab") as output:
            process = subprocess.Popen(
                agent.place.enter_argv(agent.argv),
                env=agent.place.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        self._pids[node] = process.pid
