"""Agents that run as processes of their own for as long as the tests do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from helixbench.profiler.network.iperf3 import Iperf3MissingError
from helixbench.reference_server.profiling import links as link_probe
from helixbench.reference_server.wire.keys import make_key_file
from tests.reference_server.running import AgentProcess, RunningAgents

NODES = ("n0", "n1", "n2", "n3")


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgents]:
    """Four agents, started once; tests load what they need onto them."""
    folder = tmp_path_factory.mktemp("agents")
    key_file = folder / "cluster.key"
    make_key_file(key_file)
    processes = {node: AgentProcess(key_file, folder / f"{node}.log") for node in NODES}
    try:
        yield RunningAgents({node: process.address() for node, process in processes.items()}, key_file)
    finally:
        for process in processes.values():
            process.end()


@pytest.fixture
def no_iperf3(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without iperf3, for agents in threads."""

    def missing(*_: object) -> None:
        raise Iperf3MissingError("iperf3 is not installed")

    monkeypatch.setattr(link_probe, "Iperf3Server", missing)
    monkeypatch.setattr(link_probe, "_FRAME_BYTES", 1 << 16)
