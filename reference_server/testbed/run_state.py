"""What a run has made on this machine, written down before it is made, so that a later run can remove what is left."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import tempfile
import time
from pathlib import Path

import msgspec

from helixbench.errors import InputError, MeasurementError
from helixbench.records import save_bytes
from helixbench.reference_server.testbed.namespaces import delete_namespace

logger = logging.getLogger(__name__)

PROC = Path("/proc")

# Every process of a run has this in its environment, and what it starts inherits it.
RUN_VARIABLE = "HELIXBENCH_RUN"
_KILL_TIMEOUT_S = 10.0


class RunState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One run: who owns it, and the names of all that it makes, whether or not made yet.

    The owner is known by pid, boot and start time together, for pids are used again.
    """

    run_id: str
    owner_pid: int
    owner_start_ticks: int
    boot_id: str
    namespaces: tuple[str, ...] = ()


def new_run_id() -> str:
    """Eight hexadecimal digits that no other run has."""
    return secrets.token_hex(4)


def state_folder() -> Path:
    """Folder of the state files, readable by this user alone.

    Raises:
        InputError: it exists and belongs to another user.
    """
    if os.geteuid() == 0:
        folder = Path("/run/helixbench")
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        folder = Path(runtime) / "helixbench"
    else:
        folder = Path(tempfile.gettempdir()) / f"helixbench-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); set XDG_RUNTIME_DIR to a folder") from error
    if folder.stat().st_uid != os.geteuid():
        raise InputError(f"{folder}: belongs to another user; set XDG_RUNTIME_DIR to a folder of your own")
    return folder


def key_path(folder: Path, run_id: str) -> Path:
    """Where a run keeps the key that its agents share."""
    return folder / f"{run_id}.key"


def owned_run(run_id: str, *, namespaces: tuple[str, ...]) -> RunState:
    """State of a run that this process owns."""
    pid = os.getpid()
    return RunState(
        run_id=run_id,
        owner_pid=pid,
        owner_start_ticks=_start_ticks(pid) or 0,
        boot_id=_boot_id(),
        namespaces=namespaces,
    )


def save_run(folder: Path, state: RunState) -> None:
    """Write the state file: before anything that it names is made."""
    save_bytes(_state_path(folder, state.run_id), msgspec.json.encode(state) + b"\n")


def remove_run(folder: Path, state: RunState) -> None:
    """Remove all that a run has made, in any state of completeness; the state file goes last.

    Raises:
        MeasurementError: something could not be removed; the state file is kept, for the next run to try again.
    """
    if state.boot_id == _boot_id():
        try:
            _kill_processes(state.run_id)
            for namespace in state.namespaces:
                delete_namespace(namespace)
        except OSError as error:
            raise MeasurementError(f"run {state.run_id}: not all that it made could be removed: {error}") from error
    key_path(folder, state.run_id).unlink(missing_ok=True)
    _state_path(folder, state.run_id).unlink(missing_ok=True)


def clean_stale(folder: Path) -> list[str]:
    """Remove what runs whose owner is gone have left behind; ids of those runs."""
    cleaned = []
    for path in sorted(folder.glob("*.json")):
        try:
            state = msgspec.json.decode(path.read_bytes(), type=RunState)
        except FileNotFoundError:
            continue  # another run was quicker
        except msgspec.MsgspecError as error:
            logger.warning("%s: not a state file of this version (%s); what it names is left as it is", path, error)
            continue
        if _is_owner_alive(state):
            continue
        logger.warning("removing what run %s (pid %d, gone) has left behind", state.run_id, state.owner_pid)
        remove_run(folder, state)
        cleaned.append(state.run_id)
    return cleaned


def _state_path(folder: Path, run_id: str) -> Path:
    return folder / f"{run_id}.json"


def _is_owner_alive(state: RunState) -> bool:
    return state.boot_id == _boot_id() and _start_ticks(state.owner_pid) == state.owner_start_ticks


def _boot_id() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; ``None`` where there is no such process, or a dead one."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _kill_processes(run_id: str) -> None:
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while pids := _processes(run_id):
        if time.monotonic() > deadline:
            raise MeasurementError(f"run {run_id}: processes {sorted(pids)} do not end; end them by hand")
        for pid in pids:
            _kill(pid, run_id)
        time.sleep(0.02)


def _processes(run_id: str) -> set[int]:
    """Living processes that carry the run's mark."""
    everyone = {int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()}
    found = {pid for pid in everyone if _is_marked(pid, run_id)}
    return {pid for pid in found - {os.getpid()} if _start_ticks(pid) is not None}


def _is_marked(pid: int, run_id: str) -> bool:
    try:
        environment = (PROC / str(pid) / "environ").read_bytes()
    except OSError:  # gone by now, or another user's
        return False
    return f"{RUN_VARIABLE}={run_id}".encode() in environment.split(b"\0")


def _kill(pid: int, run_id: str) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # Asked again with the handle held: from here on the pid cannot become another process.
        if _is_marked(pid, run_id):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        os.close(handle)
