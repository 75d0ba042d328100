"""Testbeds: put agents on nodes of this machine or others, and take everything away again."""

from __future__ import annotations

from helixbench.reference_server.testbed.process import AgentArgv, AgentOptions, agent_argv
from helixbench.reference_server.testbed.spec import LinkCap, LocalNode, RemoteNode, TestbedSpec, load_testbed
from helixbench.reference_server.testbed.testbed import Testbed, start_testbed

__all__ = [
    "AgentArgv",
    "AgentOptions",
    "LinkCap",
    "LocalNode",
    "RemoteNode",
    "Testbed",
    "TestbedSpec",
    "agent_argv",
    "load_testbed",
    "start_testbed",
]
