"""Examine this machine and the agents of a cluster: gathers facts, asks, and puts the findings together."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from helixbench.errors import HelixbenchError
from helixbench.records import Provenance
from helixbench.reference_server.doctor.checks import examine, examine_clock, examine_together
from helixbench.reference_server.doctor.facts import NodeFacts
from helixbench.reference_server.doctor.findings import Finding, ok, problem
from helixbench.reference_server.doctor.gather import gather_facts

if TYPE_CHECKING:
    from helixbench.reference_server.wire.keys import ClusterKey

HERE = "this machine"
EVERYWHERE = "all nodes"
_CONNECT_S = 5.0
_EXAMINE_S = 60.0  # an agent may have to load NVML, and may have a small share of a core
_NUM_CLOCK_READINGS = 8


class Diagnosis(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    omit_defaults=True,
    tag_field="schema",
    tag="helixbench.doctor/1",
):
    """Findings by node, and the facts that they come from."""

    findings: dict[str, tuple[Finding, ...]]
    facts: dict[str, NodeFacts]
    provenance: Provenance = Provenance()

    @property
    def num_problems(self) -> int:
        """How many findings are problems."""
        return sum(finding.state == "problem" for own in self.findings.values() for finding in own)


def diagnose_here(listen: str = "", *, gather: Callable[[], NodeFacts] = gather_facts) -> Diagnosis:
    """This machine; and whether an agent could ``listen`` at that ``HOST:PORT``, where one is given."""
    facts = gather()
    findings = examine(facts)
    if listen:
        findings = (*findings, examine_listening(listen))
    return Diagnosis(findings={HERE: findings}, facts={HERE: facts})


def examine_listening(address: str) -> Finding:
    """Whether this machine's ``HOST:PORT`` is free to listen on."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_server((host, int(port))):
            return ok("port", f"{address} is free")
    except (OSError, ValueError, OverflowError) as error:
        says = f"cannot listen on {address}: {getattr(error, 'strerror', None) or error}"
        return problem("port", says, "end what listens there (ss -ltnp), or give another HOST:PORT of this machine")


def diagnose_agents(addresses: Mapping[str, str], key_file: Path) -> Diagnosis:
    """The nodes of these agents: node -> ``HOST:PORT``. One that cannot be reached or asked is a problem, not an error.

    Raises:
        InputError: the key file cannot be used.
    """
    from helixbench.reference_server.wire.keys import load_key_file

    key = load_key_file(key_file)
    findings: dict[str, tuple[Finding, ...]] = {}
    facts: dict[str, NodeFacts] = {}
    for node, address in addresses.items():
        reached = _examine_reach(address)
        findings[node] = (reached,)
        if reached.state != "ok":
            continue
        try:
            facts[node], clock = _ask(node, address, key)
        except HelixbenchError as error:
            remedy = "is it an agent of this version, with the same --key, and not busy?"
            findings[node] += (problem("agent", str(error), remedy),)
            continue
        findings[node] += (*examine(facts[node]), clock)
    if len(facts) > 1:
        findings[EVERYWHERE] = examine_together(facts)
    return Diagnosis(findings=findings, facts=facts)


def _examine_reach(address: str) -> Finding:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            return ok("reach", f"{address} accepts connections")
    except (OSError, ValueError, OverflowError) as error:
        says = f"{address}: {getattr(error, 'strerror', None) or error}"
        return problem("reach", says, "start the agent there, open the port in its firewall, or correct the address")


def _ask(node: str, address: str, key: ClusterKey) -> tuple[NodeFacts, Finding]:
    from helixbench.reference_server.doctor.messages import ClockRead, Examine, Examined, ReadClock
    from helixbench.reference_server.wire.client import Agents

    with Agents({node: address}, key) as agents:
        agents.require_present()
        readings = []
        for _ in range(_NUM_CLOCK_READINGS):
            before, begin = time.time(), time.perf_counter()
            answer = agents.ask_one(node, ReadClock(), ClockRead, timeout_s=_CONNECT_S)
            round_trip_s = time.perf_counter() - begin
            readings.append((round_trip_s, answer.wall_s - (before + round_trip_s / 2)))
        facts = agents.ask_one(node, Examine(), Examined, timeout_s=_EXAMINE_S).facts
    round_trip_s, offset_s = min(readings)  # the quickest is the surest
    return facts, examine_clock(offset_s, round_trip_s / 2)
