"""What keeps the nodes of one machine apart: decided once per run, and said in every output."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from helixbench.reference_server.testbed.cgroup import grant_realtime, limit_cpu, make_group, remove_group
from helixbench.reference_server.testbed.cpu import CpuController
from helixbench.reference_server.testbed.namespaces import why_no_namespaces
from helixbench.reference_server.testbed.process import Place
from helixbench.reference_server.testbed.realtime import MOST, why_no_realtime
from helixbench.reference_server.testbed.spec import MIN_CPU, TestbedSpec


class Isolation(msgspec.Struct, frozen=True, kw_only=True):
    """How the CPU and the network of local nodes are limited.

    ``controller`` makes their CPU quotas; ``None`` where they idle instead, for the reason in ``no_quota``. Each has a
    network namespace of its own where ``no_namespaces`` is empty; else that says why not. With a quota a message
    wakes them at once where ``no_realtime`` is empty.
    """

    controller: CpuController | None
    no_quota: str = ""
    no_namespaces: str = ""
    no_realtime: str = ""

    @property
    def has_namespaces(self) -> bool:
        """Whether local nodes are in network namespaces of their own."""
        return not self.no_namespaces

    @property
    def is_realtime(self) -> bool:
        """Whether a message wakes local nodes at once."""
        return self.controller is not None and not self.no_realtime

    @property
    def is_full(self) -> bool:
        """Whether both CPU and network are kept apart by the kernel."""
        return self.controller is not None and self.has_namespaces


def find_isolation(controller: CpuController | None, *, trial_group: Path | None, has_remote_nodes: bool) -> Isolation:
    """What this process may do on this machine, found by trying it.

    Args:
        controller: the CPU controller, where one is mounted.
        trial_group: a group that may be made and removed to find out.
        has_remote_nodes: then nodes stay in the machine's own network, where the remote ones reach them.
    """
    no_quota, no_realtime = _why_not(controller, trial_group)
    return Isolation(
        controller=None if no_quota else controller,
        no_quota=no_quota,
        no_realtime=no_realtime,
        no_namespaces="for nodes at an address to reach them" if has_remote_nodes else why_no_namespaces(),
    )


def _why_not(controller: CpuController | None, group: Path | None) -> tuple[str, str]:
    """Why there is no quota, and, where there is one, why no real time; empty where there is."""
    if os.geteuid() != 0:
        return "not root", ""
    if controller is None or group is None:
        return "no CPU controller is mounted", ""
    try:
        make_group(controller, group)
        limit_cpu(controller, group, MIN_CPU)
        no_realtime = _why_no_realtime(group)
        remove_group(group)
    except OSError as error:
        return f"no CPU quota can be set below {controller.root}: {error.strerror}", ""
    return "", no_realtime


def _why_no_realtime(group: Path) -> str:
    try:
        grant_realtime(group, MOST)
    except OSError as error:
        return f"{group.name}: {error.strerror}"
    return why_no_realtime(Place(run_id="", cgroup=group))


def describe(spec: TestbedSpec, isolation: Isolation) -> str:
    """One line for every output: what of the testbed is real, and what is not."""
    parts = []
    if spec.local_nodes:
        parts.append(_count(len(spec.local_nodes), "node") + " on this machine")
        num_cuda = sum(node.device != "cpu" for node in spec.local_nodes)
        if num_cuda:
            parts.append(_count(num_cuda, "node") + " on CUDA, neither paced nor limited")
        if num_cuda < len(spec.local_nodes):
            parts.append(_cpu(isolation))
        parts.append(_network(spec, isolation))
    if spec.remote_nodes:
        parts.append(f"{_count(len(spec.remote_nodes), 'node')} at an address, as found there")
    return "; ".join(parts)


def _cpu(isolation: Isolation) -> str:
    if isolation.controller is not None:
        woken = " at once" if isolation.is_realtime else f" only in turn ({isolation.no_realtime})"
        version = isolation.controller.version
        return f"iterations paced to their share of a core, cgroup v{version} quota, messages wake nodes{woken}"
    return f"CPU EMULATED by idling in proportion, the coordinator's not limited ({isolation.no_quota})"


def _network(spec: TestbedSpec, isolation: Isolation) -> str:
    if isolation.has_namespaces:
        shaped = "bandwidth by tc htb" if spec.has_bandwidth_limits else "bandwidth not limited"
        return f"a network namespace each, {shaped}"
    shaped = "links NOT SHAPED" if spec.has_bandwidth_limits else "bandwidth not limited"
    return f"plain processes without network namespaces, {shaped} ({isolation.no_namespaces})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
