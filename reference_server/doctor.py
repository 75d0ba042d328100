"""``helixbench doctor``: describe this machine, or ask agents to describe theirs, and check what they say."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from helixbench.errors import HelixbenchError, InputError
from helixbench.profiler.device import Facts
from helixbench.records import Provenance
from helixbench.reference_server.fitness import Finding, NodeFacts, State, examine, examine_together

HERE, EVERYWHERE = "this machine", "all nodes"
_CONNECT_S = 5.0


class Diagnosis(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="schema", tag="helixbench.doctor/2"
):
    """Findings by node, and the facts behind them."""

    findings: dict[str, tuple[Finding, ...]]
    facts: dict[str, NodeFacts]
    provenance: Provenance = Provenance()

    def count(self, state: State) -> int:
        """Number of findings in that state."""
        return sum(finding.state == state for own in self.findings.values() for finding in own)


def diagnose_here(listen: str = "") -> Diagnosis:
    """Check this machine; with ``listen`` also whether an agent could listen at that ``HOST:PORT``."""
    facts, unusable = _describe_here()
    findings = [*unusable, *examine(facts), _testbeds()]
    if listen:
        findings.append(_listening(listen))
    return Diagnosis(findings={HERE: tuple(findings)}, facts={HERE: facts})


def diagnose_agents(addresses: Mapping[str, str], key_file: Path) -> Diagnosis:
    """Check the nodes of these agents: node -> ``HOST:PORT``. An agent that does not answer is a problem, no error.

    Raises:
        InputError: the key file cannot be used.
    """
    from helixbench.reference_server.wire.client import Agents
    from helixbench.reference_server.wire.keys import load_key_file

    key = load_key_file(key_file)
    findings: dict[str, tuple[Finding, ...]] = {}
    facts: dict[str, NodeFacts] = {}
    for node, address in addresses.items():
        findings[node] = (_reaching(address),)
        if findings[node][0].state != "ok":
            continue
        try:
            with Agents({node: address}, key) as agents:
                answer = agents.describe()[node]
        except HelixbenchError as error:
            remedy = "is it an agent of this version, with the same --key, and not busy?"
            findings[node] += (Finding("agent", "problem", str(error), remedy),)
            continue
        facts[node] = NodeFacts((answer.device,), answer.versions, answer.machine)
        findings[node] += examine(facts[node])
    if len(facts) > 1:
        findings[EVERYWHERE] = examine_together(facts)
    return Diagnosis(findings=findings, facts=facts)


def _describe_here() -> tuple[NodeFacts, list[Finding]]:
    """This machine's processor and every GPU that torch sees; and what keeps torch from seeing one."""
    from helixbench.profiler.device import describe_device
    from helixbench.profiler.machine import library_versions, machine_facts

    machine, versions = machine_facts(), library_versions()
    try:
        import torch
    except Exception as error:  # a torch that does not fit its CUDA or this machine fails in many ways
        says = f"cannot be imported ({type(error).__name__}: {error})"
        remedy = "install it again, for this Python and CUDA"
        return NodeFacts((), versions, machine), [Finding("torch", "problem", says, remedy)]
    devices = []
    unusable = [] if torch.cuda.device_count() else _unseen_gpus(machine, torch.version.cuda)
    for name in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        try:
            devices.append(describe_device(name))
        except (InputError, RuntimeError) as error:  # a GPU that does not answer: the others are checked all the same
            remedy = "reset it, or leave it out by CUDA_VISIBLE_DEVICES"
            unusable.append(Finding(name, "problem", str(error), remedy))
    return NodeFacts(tuple(devices), versions, machine), unusable


def _unseen_gpus(machine: Facts, torch_cuda: str | None) -> list[Finding]:
    from packaging.version import Version

    from helixbench.profiler.device import driver_facts

    if not machine.get("nvidia_devices"):
        return [Finding("GPU", "ok", "no NVIDIA device; this node computes on CPU")]
    driver = driver_facts()
    newest = str(driver.get("cuda_driver", ""))
    if "driver" not in driver:
        says = f"there is an NVIDIA device, but NVML is {driver.get('nvml', 'silent')}"
        return [Finding("GPU", "problem", says, "reload the driver until nvidia-smi works; pip install nvidia-ml-py")]
    if torch_cuda is None:
        says, remedy = "torch is built without CUDA", "install torch from its CUDA wheel index"
    elif newest and Version(torch_cuda).major > Version(newest).major:
        says = f"torch is built for CUDA {torch_cuda}, driver {driver['driver']} supports up to {newest}"
        remedy = "update the driver, or install torch for the driver's CUDA"
    else:
        shown = repr(os.environ.get("CUDA_VISIBLE_DEVICES", "not set"))
        says = f"torch for CUDA {torch_cuda} sees no GPU; CUDA_VISIBLE_DEVICES is {shown}"
        remedy = "unset CUDA_VISIBLE_DEVICES, or name a device (or MIG instance) that exists"
    return [Finding("GPU", "problem", says, remedy)]


def _testbeds() -> Finding:
    from helixbench.reference_server.testbed.namespaces import why_no_namespaces

    why = why_no_namespaces()
    if not why:
        return Finding("testbeds", "ok", "with network namespaces and shaped links")
    says = f"without shaped links: {why}"
    return Finding("testbeds", "warning", says, "run as root with CAP_NET_ADMIN, iproute2 and util-linux installed")


def _listening(address: str) -> Finding:
    remedy = "end what listens there (ss -ltnp), or give another HOST:PORT of this machine"
    return _socket("port", f"{address} is free to listen on", remedy, address, socket.create_server)


def _reaching(address: str) -> Finding:
    remedy = "start the agent there, open the port in its firewall, or correct the address"
    says = f"{address} accepts connections"
    return _socket("reach", says, remedy, address, lambda to: socket.create_connection(to, timeout=_CONNECT_S))


def _socket(
    check: str, says: str, remedy: str, address: str, open_socket: Callable[[tuple[str, int]], socket.socket]
) -> Finding:
    host, _, port = address.rpartition(":")
    try:
        open_socket((host.strip("[]"), int(port))).close()
    except (OSError, ValueError, OverflowError) as error:
        return Finding(check, "problem", f"{address}: {getattr(error, 'strerror', None) or error}", remedy)
    return Finding(check, "ok", says)
