"""Testbeds: put agents on nodes of this machine or others, and take everything away again."""

from __future__ import annotations

from .agents import AgentArgv, AgentOptions, agent_argv
from .spec import LinkCap, LocalNode, RemoteNode, TestbedSpec, load_testbed
from .testbed import Testbed, start_testbed

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
