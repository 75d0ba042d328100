"""What keeps the nodes of one machine apart: decided once per run, and said in every output."""

from __future__ import annotations

from collections import Counter

import msgspec

from helixbench.reference_server.testbed.cpu import available_cpus
from helixbench.reference_server.testbed.namespaces import why_no_namespaces
from helixbench.reference_server.testbed.spec import TestbedSpec


class Isolation(msgspec.Struct, frozen=True, kw_only=True):
    """Whether each local node has a network namespace of its own; ``no_namespaces`` says why not, and is empty else."""

    no_namespaces: str = ""

    @property
    def has_namespaces(self) -> bool:
        """Whether local nodes are in network namespaces of their own."""
        return not self.no_namespaces


def find_isolation(spec: TestbedSpec) -> Isolation:
    """What this process may do on this machine, found by trying it.

    Nodes stay in the machine's own network where remote ones have to reach them.
    """
    reason = "for nodes at an address to reach them" if spec.remote_nodes else why_no_namespaces()
    return Isolation(no_namespaces=reason)


def describe(spec: TestbedSpec, isolation: Isolation) -> str:
    """One line for every output: what of the testbed is real, and what is not."""
    parts = []
    if spec.local_nodes:
        parts.append(_count(len(spec.local_nodes), "node") + " on this machine")
        num_cuda = sum(node.device != "cpu" for node in spec.local_nodes)
        if num_cuda:
            parts.append(f"{_count(num_cuda, 'node')} on CUDA")
        parts += _emulated(spec)
        parts += _cpu(spec)
        parts.append(_network(spec, isolation))
        if spec.has_latencies:
            parts.append("latencies by holding messages at the receiving end")
    if spec.remote_nodes:
        parts.append(f"{_count(len(spec.remote_nodes), 'node')} at an address, as found there")
    return "; ".join(parts)


def _emulated(spec: TestbedSpec) -> list[str]:
    """Emulated devices by name, and how much slower than they everything runs."""
    names = Counter(node.emulated.name for node in spec.local_nodes if node.emulated is not None)
    if not names:
        return []
    devices = ", ".join(f"{count} {name}" for name, count in sorted(names.items()))
    scale = f" at time scale {spec.time_scale:g}" if spec.time_scale != 1 else ""
    return [f"EMULATED devices ({devices}){scale}"]


def _cpu(spec: TestbedSpec) -> list[str]:
    """Threads of the nodes on CPU; where there are more than cores, nodes slow one another down."""
    on_cpu = [node for node in spec.local_nodes if node.device == "cpu" and node.emulated is None]
    threads, cores = sum(node.threads for node in on_cpu), available_cpus()
    if not on_cpu:
        return []
    shared = f", MORE THAN ITS {cores:g} CORES: they slow one another down" if threads > cores else ""
    return [f"{_count(len(on_cpu), 'node')} on CPU with {_count(threads, 'thread')} in all{shared}"]


def _network(spec: TestbedSpec, isolation: Isolation) -> str:
    if isolation.has_namespaces:
        shaped = "bandwidth by tc htb" if spec.has_bandwidth_limits else "bandwidth not limited"
        return f"a network namespace each, {shaped}"
    shaped = "links NOT SHAPED" if spec.has_bandwidth_limits else "bandwidth not limited"
    return f"plain processes without network namespaces, {shaped} ({isolation.no_namespaces})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
