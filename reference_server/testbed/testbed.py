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

import msgspec

from helixbench.errors import HelixbenchError, InputError, MeasurementError
from helixbench.profiler.cluster import COORDINATOR
from helixbench.reference_server.testbed.cgroup import (
    give_realtime_back,
    grant_realtime,
    group_path,
    limit_cpu,
    make_group,
)
from helixbench.reference_server.testbed.cpu import find_cpu_controller
from helixbench.reference_server.testbed.interrupts import Interrupts
from helixbench.reference_server.testbed.isolation import Isolation, describe, find_isolation
from helixbench.reference_server.testbed.namespaces import make_network
from helixbench.reference_server.testbed.process import (
    READY_TIMEOUT_S,
    AgentArgv,
    AgentOptions,
    LocalAgent,
    Place,
    agent_argv,
)
from helixbench.reference_server.testbed.realtime import MOST_COORDINATOR, node_grant
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
from helixbench.reference_server.testbed.wiring import isolated_hosts, members, shared_hosts, stations

logger = logging.getLogger(__name__)

_REAP_TIMEOUT_S = 10.0

CEILING = 2.0
"""A node on CPU is paced to its share (``pacing.Pacer``); its quota is so many times that, a ceiling for all else.

A quota of the share itself would hold back messages: a period's quota goes to one core in slices of 5 ms, and a thread
that sends on another core waits for the next period (measured at a share of 0.2: 4 ms a message, without it 0.4 ms).
"""


READY_VARIABLE = "HELIXBENCH_READY_FD"


def say_ready() -> None:
    """Called by a driver: its imports are done, its CPU may be limited. Outside a testbed it does nothing."""
    descriptor = os.environ.pop(READY_VARIABLE, None)
    if descriptor is not None:
        os.write(int(descriptor), b"!")
        os.close(int(descriptor))


class Testbed:
    """Running agents, and a place for the driver that coordinates them.

    Attributes:
        addresses: node -> ``host:port`` of its agent, as the driver and the other agents reach it.
        key_file: the key that all agents share.
        description: one line that says what is kept apart by the kernel and what is not; belongs in every output.
        isolated: whether each local node has a network namespace of its own, and on CPU a quota.
    """

    def __init__(
        self,
        *,
        description: str,
        isolated: bool,
        key_file: Path,
        coordinator: Place,
        limit_coordinator: Callable[[], None],
        addresses: Mapping[str, str],
        agents: Sequence[LocalAgent],
        interrupts: Interrupts,
        processes: list[subprocess.Popen[bytes]],
    ) -> None:
        self.description = description
        self.isolated = isolated
        self.key_file = key_file
        self.addresses = addresses
        self._coordinator = coordinator
        self._limit_coordinator = limit_coordinator
        self._agents = agents
        self._interrupts = interrupts
        self._processes = processes  # all that the run has started, for whoever ends it

    def check(self) -> None:
        """Raise where an agent that was started here has ended.

        Raises:
            MeasurementError: naming the node, with the end of its log.
        """
        for agent in self._agents:
            agent.check()

    def run_driver(self, argv: Sequence[str], pass_fds: Sequence[int] = (), *, says_when_ready: bool = False) -> int:
        """Run a program as the coordinator, in its namespace and group, until it ends; its exit code.

        It inherits stdin, stdout, stderr and ``pass_fds``. SIGINT, SIGTERM and SIGHUP that this process gets are passed
        on to it, and it decides what becomes of them; the third one kills it. Ended by a signal, the code is
        128 + signal. Signals are passed on where this is called in the main thread.

        Args:
            argv: the program.
            pass_fds: file descriptors that it inherits.
            says_when_ready: it calls ``say_ready`` when its imports are done, and has its CPU limited from then on.
        """
        ready, said = os.pipe()
        try:
            if not says_when_ready:
                self._limit_coordinator()
            with self._interrupts.deferred():
                driver = subprocess.Popen(
                    self._coordinator.enter_argv(argv),
                    env=self._coordinator.environment() | {READY_VARIABLE: str(said)},
                    pass_fds=(*pass_fds, said),
                    start_new_session=True,  # a terminal's Ctrl-C then reaches it once: from here
                )
                self._processes.append(driver)
            os.close(said)
            said = -1
            with self._interrupts.passed_to(driver.pid):
                if says_when_ready and os.read(ready, 1):
                    self._limit_coordinator()
                code = _wait(driver)
        finally:
            for descriptor in (ready, said):
                if descriptor >= 0:
                    os.close(descriptor)
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
        isolate: whether to use network namespaces and CPU quotas where the machine lets us.
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
        self._controller = find_cpu_controller()
        run_id = new_run_id()
        self._hub = f"hb{run_id}-hub"
        self._namespaces = {name: f"hb{run_id}-{index}" for index, name in enumerate(members(spec))}
        self._groups: dict[str, Path] = {}
        if self._controller is not None:
            self._groups = {
                name: group_path(self._controller, run_id=run_id, index=index)
                for index, name in enumerate(members(spec))
            }
        self._processes: list[subprocess.Popen[bytes]] = []
        self.state = owned_run(
            run_id,
            namespaces=(self._hub, *self._namespaces.values()),
            cgroups=tuple(str(group) for group in self._groups.values()),
        )

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
        isolation = self._make_groups(self._find_isolation(isolate))
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
            argv = argv_of(_agent_options(node, host=hosts[node.name], key_file=key_file))
            with interrupts.deferred():
                agent = LocalAgent(
                    name=node.name, log=self._log_dir / f"{node.name}.log", place=places[node.name], argv=argv
                )
                self._processes.append(agent.process)
            agents.append(agent)
        addresses = {node.name: node.address for node in self._spec.remote_nodes}
        addresses |= {agent.name: agent.wait_ready(ready_timeout_s) for agent in agents}
        for node in self._spec.local_nodes:
            if node.device == "cpu":
                self._limit_cpu(isolation, node.name, min(1.0, CEILING * node.cpu))
        return Testbed(
            description=describe(self._spec, isolation),
            isolated=isolation.is_full,
            key_file=key_file,
            coordinator=places[COORDINATOR],
            limit_coordinator=lambda: self._limit_cpu(isolation, COORDINATOR, self._spec.coordinator_cpu),
            addresses={name: addresses[name] for name in self._spec.node_names},
            agents=agents,
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

    def _find_isolation(self, isolate: bool) -> Isolation:
        if not isolate:
            return Isolation(controller=None, no_quota="as asked", no_namespaces="as asked")
        return find_isolation(
            self._controller,
            trial_group=self._groups.get(COORDINATOR),
            has_remote_nodes=bool(self._spec.remote_nodes),
        )

    def _make_places(self, isolation: Isolation) -> dict[str, Place]:
        if isolation.has_namespaces:
            make_network(hub=self._hub, stations=stations(self._spec, self._namespaces))
        return {
            name: Place(
                run_id=self.state.run_id,
                namespace=self._namespaces[name] if isolation.has_namespaces else None,
                cgroup=self._groups[name] if isolation.controller is not None else None,
                is_realtime=isolation.is_realtime,
            )
            for name in members(self._spec)
        }

    def _make_groups(self, isolation: Isolation) -> Isolation:
        """All groups, each with its part of real time; where that is not granted to all of them, none has any."""
        if isolation.controller is None:
            return isolation
        for group in self._groups.values():
            make_group(isolation.controller, group)
        if not isolation.is_realtime:
            return isolation
        share = node_grant(len(self._spec.local_nodes))
        coordinator = min(MOST_COORDINATOR, self._spec.coordinator_cpu)
        for name, group in self._groups.items():
            try:
                grant_realtime(group, coordinator if name == COORDINATOR else share)
            except OSError as error:
                for granted in self._groups.values():
                    give_realtime_back(granted)
                return msgspec.structs.replace(isolation, no_realtime=f"{group.name}: {error.strerror}")
        return isolation

    def _limit_cpu(self, isolation: Isolation, name: str, cpu: float) -> None:
        """Set a quota: once the process is ready, for importing libraries at a fifth of a core takes long."""
        if isolation.controller is None:
            return
        group = self._groups[name]
        try:
            limit_cpu(isolation.controller, group, cpu)
        except OSError as error:
            raise MeasurementError(
                f"node {name}: its quota of {cpu:g} cores cannot be set in {group}: {error.strerror}"
            ) from error


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Its exit code; a signal that strikes just before a wait without a limit would be handled when that ends."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1.0)


def _agent_options(node: LocalNode, *, host: str, key_file: Path) -> AgentOptions:
    return AgentOptions(
        name=node.name,
        listen=f"{host}:0",
        key_file=key_file,
        memory_bytes=math.floor(node.memory_bytes),
        device=node.device,
        # One compute thread per node: of more than one core, it uses one. CPU time says nothing of a CUDA device's.
        cpu_share=min(1.0, node.cpu) if node.device == "cpu" else None,
    )


def _make_server_key(path: Path) -> None:
    from helixbench.reference_server.wire.keys import make_key_file

    make_key_file(path)
