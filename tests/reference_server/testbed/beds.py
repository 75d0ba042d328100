"""What the launcher's tests share: a small testbed, its dummy agents, and a look at what a run has left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from helixbench.reference_server.testbed import namespaces as netns
from helixbench.reference_server.testbed import process as agents
from helixbench.reference_server.testbed import run_state, spec, testbed

DUMMY_AGENT = Path(__file__).with_name("dummy_agent.py")
MBIT = 1e6 / 8  # bytes per second
NODES = ("big", "small")


def _why_no_root() -> str:
    if sys.platform != "linux" or os.geteuid() != 0:
        return "not root on Linux"
    return netns.why_no_namespaces()


NO_ROOT = _why_no_root()
needs_root = pytest.mark.skipif(bool(NO_ROOT), reason=f"needs namespaces: {NO_ROOT}")
needs_iperf3 = pytest.mark.skipif(shutil.which("iperf3") is None, reason="iperf3 is not installed")


def small_spec(*, card: float | None = None, links: tuple[spec.LinkSpec, ...] = ()) -> spec.TestbedSpec:
    return spec.TestbedSpec(
        local_nodes=tuple(spec.LocalNode(name=name, memory_bytes=1e6, bandwidth_bytes_per_s=card) for name in NODES),
        node_names=NODES,
        links=links,
        coordinator_bandwidth_bytes_per_s=card,
    )


def dummy_argv(mode: str = "") -> Callable[[agents.AgentOptions], list[str]]:
    return lambda options: [sys.executable, "-S", str(DUMMY_AGENT), options.listen, mode]


def write_key(path: Path) -> None:
    path.write_text("secret")


def start(
    test_spec: spec.TestbedSpec, log_dir: Path, *, mode: str = "", isolate: bool = True, ready_timeout_s: float = 20.0
) -> AbstractContextManager[testbed.Testbed]:
    return testbed.start_testbed(
        test_spec,
        log_dir=log_dir,
        argv_of=dummy_argv(mode),
        make_key=write_key,
        isolate=isolate,
        ready_timeout_s=ready_timeout_s,
    )


def run_id_of(bed: testbed.Testbed) -> str:
    return bed.key_file.stem


def left_behind(run_id: str) -> list[str]:
    """Namespaces, files and processes of a run that still exist."""
    found = [str(path) for path in netns.NETNS_DIR.glob(f"hb{run_id}*")]
    found += [str(path) for path in run_state.state_folder().glob(f"{run_id}*")]
    mark = f"{run_state.RUN_VARIABLE}={run_id}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes():
                found.append(str(process))
        except OSError:
            continue
    return found


def output_of(bed: testbed.Testbed, argv: list[str], into: Path) -> str:
    """What a driver writes to stdout; it has to end with exit code 0."""
    shell = ["sh", "-c", 'out=$1; shift; exec "$@" >"$out"', "sh", str(into), *argv]
    assert bed.run_driver(shell) == 0
    return into.read_text()


def repository_root() -> Path:
    return Path(__file__).resolve().parents[3]


def run_script(*arguments: str) -> subprocess.Popen[str]:
    """``hold_testbed.py`` in a process of its own, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.reference_server.testbed.hold_testbed", *arguments],
        cwd=repository_root(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
