"""Put agents on the nodes of a testbed, run a driver as its coordinator, and leave nothing behind."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from helixbench.errors import HelixbenchError, InputError
from helixbench.profiler.cluster import COORDINATOR
from helixbench.reference_server.testbed.emulation import Timing
from helixbench.reference_server.testbed.interrupts import Interrupts
from helixbench.reference_server.testbed.isolation import Isolation, describe, find_isolation
from helixbench.reference_server.testbed.namespaces import Station, make_network
from helixbench.reference_server.testbed.process import (
    READY_TIMEOUT_S,
    AgentArgv,
    AgentOptions,
    LocalAgent,
    Place,
    agent_argv,
)
from helixbench.reference_server.testbed.run_state import (
    clean_stale,
    key_path,
    new_run_id,
    owned_run,
    remove_run,
    save_run,
    state_folder,
)
from helixbench.reference_server.testbed.spec import LocalNode, TestbedSpec
from helixbench.reference_server.testbed.wiring import isolated_hosts, latencies, members, shared_hosts, stations

logger = logging.getLogger(__name__)

_REAP_TIMEOUT_S = 10.0


class Testbed:
    """Running agents, and a place for the driver that coordinates them.

    Attributes:
        addresses: node -> ``host:port`` of its agent, as the driver and the other agents reach it.
        key_file: the key that all agents share.
        description: one line that says what is kept apart by the kernel and what is not; belongs in every output.
        isolated: whether each local node has a network namespace of its own.
        timing: how time passes.
        agents: node -> its agent, of those that were started here.
        stations: member -> its place on the network; empty where there are no namespaces.
        emulated: nodes that keep the times of an emulated device.
    """

    def __init__(
        self,
        *,
        description: str,
        isolated: bool,
        timing: Timing,
        key_file: Path,
        coordinator: Place,
        addresses: Mapping[str, str],
        agents: Sequence[LocalAgent],
        stations: Mapping[str, Station],
        emulated: tuple[str, ...],
        interrupts: Interrupts,
        processes: list[subprocess.Popen[bytes]],
    ) -> None:
        self.description = description
        self.isolated = isolated
        self.timing = timing
        self.key_file = key_file
        self.addresses = addresses
        self._coordinator = coordinator
        self.agents = {agent.name: agent for agent in agents}
        self.stations = stations
        self.emulated = emulated
        self._interrupts = interrupts
        self._processes = processes  # all that the run has started, for whoever ends it

    def check(self) -> None:
        """Raise where an agent that was started here has ended.

        Raises:
            MeasurementError: naming the node, with the end of its log.
        """
        for agent in self.agents.values():
            agent.check()

    def run_driver(self, argv: Sequence[str], pass_fds: Sequence[int] = ()) -> int:
        """Run a program as the coordinator, in its namespace, until it ends; its exit code.

        It inherits stdin, stdout, stderr and ``pass_fds``. SIGINT, SIGTERM and SIGHUP that this process gets are passed
        on to it, and it decides what becomes of them; the third one kills it. Ended by a signal, the code is
        128 + signal. Signals are passed on where this is called in the main thread.
        """
        with self._interrupts.deferred():
            driver = subprocess.Popen(
                self._coordinator.enter_argv(argv),
                env=self._coordinator.environment(),
                pass_fds=tuple(pass_fds),
                start_new_session=True,  # a terminal's Ctrl-C then reaches it once: from here
            )
            self._processes.append(driver)
        with self._interrupts.passed_to(driver.pid):
            code = _wait(driver)
        return code if code >= 0 else 128 - code


@contextlib.contextmanager
def start_testbed(
    spec: TestbedSpec,
    *,
    log_dir: Path,
    argv_of: AgentArgv = agent_argv,
    make_key: Callable[[Path], None] | None = None,
    isolate: bool = True,
    ready_timeout_s: float = READY_TIMEOUT_S,
) -> Iterator[Testbed]:
    """Start the agents of all local nodes; on leaving, remove everything that was made.

    Also removes first what an earlier run left behind whose owner was killed. Agents end with the thread that calls
    this: call it in one that lives as long as they are needed (signals are handled in the main thread only).

    Args:
        spec: the testbed.
        log_dir: where each agent's output goes, as ``<node>.log``; made where missing.
        argv_of: command line of an agent.
        make_key: writes the key file that all agents share; the server's own where not given.
        isolate: whether to use network namespaces where the machine lets us.
        ready_timeout_s: how long agents may take to listen.

    Raises:
        InputError: an agent refused what it was told, or the nodes cannot reach each other.
        MeasurementError: an agent or a part of the network could not be started.
    """
    folder = state_folder()
    clean_stale(folder)
    run = _Run(spec, folder=folder, log_dir=log_dir)
    with Interrupts() as interrupts:
        atexit.register(run.remove)  # should a signal strike before the blocks below are entered, or after
        try:
            try:
                save_run(folder, run.state)
                yield run.start(
                    interrupts=interrupts,
                    argv_of=argv_of,
                    make_key=make_key or _make_server_key,
                    isolate=isolate,
                    ready_timeout_s=ready_timeout_s,
                )
            finally:
                interrupts.hold()
        finally:
            run.remove()
            atexit.unregister(run.remove)


class _Run:
    """One run of a testbed: makes what its state names, and removes it again."""

    def __init__(self, spec: TestbedSpec, *, folder: Path, log_dir: Path) -> None:
        self._spec = spec
        self._folder = folder
        self._log_dir = log_dir
        run_id = new_run_id()
        self._hub = f"hb{run_id}-hub"
        self._namespaces = {name: f"hb{run_id}-{index}" for index, name in enumerate(members(spec))}
        self._processes: list[subprocess.Popen[bytes]] = []
        self.state = owned_run(run_id, namespaces=(self._hub, *self._namespaces.values()))

    def start(
        self,
        *,
        interrupts: Interrupts,
        argv_of: AgentArgv,
        make_key: Callable[[Path], None],
        isolate: bool,
        ready_timeout_s: float,
    ) -> Testbed:
        """Make all of it, in the order in which one thing needs another."""
        isolation = find_isolation(self._spec) if isolate else Isolation(no_namespaces="as asked")
        key_file = self._spec.key_file
        if key_file is None:
            key_file = key_path(self._folder, self.state.run_id)
            make_key(key_file)
        places = self._make_places(isolation)
        hosts = isolated_hosts(self._spec) if isolation.has_namespaces else shared_hosts(self._spec)
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self._log_dir}: cannot be made ({error.strerror}); choose another folder") from error
        agents = []
        for node in self._spec.local_nodes:
            options = _agent_options(node, host=hosts[node.name], key_file=key_file, time_scale=self._spec.time_scale)
            argv = argv_of(options)
            with interrupts.deferred():
                agent = LocalAgent(
                    name=node.name, log=self._log_dir / f"{node.name}.log", place=places[node.name], argv=argv
                )
                self._processes.append(agent.process)
            agents.append(agent)
        addresses = {node.name: node.address for node in self._spec.remote_nodes}
        addresses |= {agent.name: agent.wait_ready(ready_timeout_s) for agent in agents}
        return Testbed(
            description=describe(self._spec, isolation),
            isolated=isolation.has_namespaces,
            timing=Timing(time_scale=self._spec.time_scale, latency_s=latencies(self._spec)),
            key_file=key_file,
            coordinator=places[COORDINATOR],
            addresses={name: addresses[name] for name in self._spec.node_names},
            agents=agents,
            stations=dict(zip(self._namespaces, stations(self._spec, self._namespaces), strict=True))
            if isolation.has_namespaces
            else {},
            emulated=tuple(node.name for node in self._spec.local_nodes if node.device_file is not None),
            interrupts=interrupts,
            processes=self._processes,
        )

    def remove(self) -> None:
        """Remove all that was made; a second call finds nothing left to do, and a fork of the owner does nothing."""
        if os.getpid() != self.state.owner_pid:
            return
        for process in self._processes:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_REAP_TIMEOUT_S)
        try:
            remove_run(self._folder, self.state)
        except HelixbenchError as error:
            logger.error("%s; the next run tries again", error)

    def _make_places(self, isolation: Isolation) -> dict[str, Place]:
        if isolation.has_namespaces:
            make_network(hub=self._hub, stations=stations(self._spec, self._namespaces))
        return {
            name: Place(
                run_id=self.state.run_id,
                namespace=self._namespaces[name] if isolation.has_namespaces else None,
            )
            for name in members(self._spec)
        }


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Its exit code; a signal that strikes just before a wait without a limit would be handled when that ends."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1.0)


def _agent_options(node: LocalNode, *, host: str, key_file: Path, time_scale: float) -> AgentOptions:
    return AgentOptions(
        name=node.name,
        listen=f"{host}:0",
        key_file=key_file,
        memory_bytes=math.floor(node.memory_bytes),
        device=node.device,
        threads=node.threads,
        cpus=node.cpus,
        device_file=node.device_file,
        time_scale=time_scale,
    )


def _make_server_key(path: Path) -> None:
    from helixbench.reference_server.wire.keys import make_key_file

    make_key_file(path)
