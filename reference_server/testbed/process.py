"""A process of a run: started in its namespace, waited for until it listens, watched for its end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from helixbench.errors import InputError, MeasurementError
from helixbench.reference_server.testbed import enter
from helixbench.reference_server.testbed.namespaces import namespace_file
from helixbench.reference_server.testbed.run_state import RUN_VARIABLE

# An agent imports torch before it listens: some seconds of CPU, which several may have to share.
READY_TIMEOUT_S = 60.0
_POLL_S = 0.02
_TAIL_LINES = 20


class AgentOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent is started with; ``threads``, ``cpus`` and ``device_file`` as in ``LocalNode``."""

    name: str
    listen: str
    key_file: Path
    memory_bytes: int
    device: str
    threads: int = 1
    cpus: tuple[int, ...] = ()
    device_file: Path | None = None
    time_scale: float = 1.0


AgentArgv = Callable[[AgentOptions], Sequence[str]]


def agent_argv(options: AgentOptions) -> list[str]:
    """Command line of the agent."""
    argv = [sys.executable, "-m", "helixbench.reference_server.launch.agent", "--listen", options.listen]
    argv += ["--key", str(options.key_file), "--memory", str(options.memory_bytes), "--device", options.device]
    argv += ["--threads", str(options.threads)]
    if options.cpus:
        argv += ["--cpus", ",".join(map(str, options.cpus))]
    if options.device_file is not None:
        argv += ["--emulate", str(options.device_file), "--time-scale", f"{options.time_scale:g}"]
    return argv


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a process runs: the run that it is of, and its namespace where it has one."""

    run_id: str
    namespace: str | None = None

    def enter_argv(self, argv: Sequence[str]) -> list[str]:
        """Command line that runs ``argv`` in this place, and ends it with this process."""
        entered = [sys.executable, "-I", "-S", enter.__file__, "--parent", str(os.getpid())]
        if self.namespace is not None:
            entered += ["--netns", str(namespace_file(self.namespace))]
        return [*entered, "--", *argv]

    def environment(self) -> dict[str, str]:
        """This process's environment with the run's mark."""
        return os.environ | {RUN_VARIABLE: self.run_id}


class LocalAgent:
    """An agent that was started on this machine; what it prints goes to its log file."""

    def __init__(self, *, name: str, log: Path, place: Place, argv: Sequence[str]) -> None:
        self.name = name
        self.log = log
        self.place, self.argv = place, tuple(argv)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                place.enter_argv(argv),
                env=place.environment() | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, timeout_s: float) -> str:
        """Address that it listens at, once it has said so: a line ``{"listening": "host:port"}``.

        Raises:
            InputError: it ended for what it was told (exit code 2).
            MeasurementError: it ended for another reason, or was not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            # Looked at before the log is read: what it printed before it ended is not missed.
            has_ended = self.process.poll() is not None
            if (address := _listening(self.log.read_bytes())) is not None:
                return address
            if has_ended:
                raise self._ended()
            if time.monotonic() > deadline:
                raise MeasurementError(
                    f"node {self.name}: its agent was not ready within {timeout_s:g} s; the end of {self.log}:\n"
                    f"{self._tail()}"
                )
            time.sleep(_POLL_S)

    def argv_at(self, address: str) -> tuple[str, ...]:
        """Command line of another agent in its place, at the address that it listened at."""
        listen = self.argv.index("--listen") + 1
        return (*self.argv[:listen], address, *self.argv[listen + 1 :])

    def check(self) -> None:
        """Raise where it has ended.

        Raises:
            InputError: it ended for what it was told (exit code 2).
            MeasurementError: it ended for another reason.
        """
        if self.process.poll() is not None:
            raise self._ended()

    def _ended(self) -> InputError | MeasurementError:
        code = self.process.returncode
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        message = f"node {self.name}: its agent {how}; the end of {self.log}:\n{self._tail()}"
        return InputError(message) if code == InputError.exit_code else MeasurementError(message)

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n".join(f"  {line}" for line in lines) or "  (empty)"


class _Ready(msgspec.Struct, frozen=True):
    listening: str


def _listening(output: bytes) -> str | None:
    complete = output[: output.rfind(b"\n") + 1]
    for line in complete.splitlines():
        if line.startswith(b"{"):
            try:
                return msgspec.json.decode(line, type=_Ready).listening
            except msgspec.MsgspecError:
                continue  # a log line of another kind
    return None
