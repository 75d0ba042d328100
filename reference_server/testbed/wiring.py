"""Who is on the testbed's network: at which address, over which links, and with which limits."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Mapping

from helixbench.errors import InputError
from helixbench.profiler.cluster import COORDINATOR, Link
from helixbench.reference_server.testbed.namespaces import Station, station_address
from helixbench.reference_server.testbed.spec import TestbedSpec

SHAPED = "testbed file, shaped by tc"
_LOOPBACK = "127.0.0.1"


def members(spec: TestbedSpec) -> tuple[str, ...]:
    """The coordinator and the nodes of this machine; the order gives each its index."""
    return (COORDINATOR, *(node.name for node in spec.local_nodes))


def isolated_hosts(spec: TestbedSpec) -> dict[str, str]:
    """Member -> its address, where each has a namespace of its own."""
    return {name: station_address(index) for index, name in enumerate(members(spec))}


def shared_hosts(spec: TestbedSpec) -> dict[str, str]:
    """Member -> its address, where all are in the machine's own network: one that remote nodes can reach.

    Raises:
        InputError: no one address of this machine is reached by all remote nodes.
    """
    facing = {_address_facing(node.address): node.name for node in spec.remote_nodes}
    if len(facing) > 1:
        raise InputError(
            f"nodes {', '.join(facing.values())} are reached from different addresses of this machine "
            f"({', '.join(facing)}), so they could not all reach the nodes on it; give addresses in one network"
        )
    return dict.fromkeys(members(spec), next(iter(facing), _LOOPBACK))


def stations(spec: TestbedSpec, namespaces: Mapping[str, str]) -> list[Station]:
    """The stations to make, one per member, given member -> its namespace; rates are divided by the time scale."""
    address = isolated_hosts(spec)
    nics = nic_rates(spec)
    peers: dict[str, dict[str, float]] = {name: {} for name in address}  # sender -> receiver's address -> limit
    for link in spec.links:
        if link.bandwidth_bytes_per_s is not None:
            for sender, receiver in (link.between, link.between[::-1]):
                peers[sender][address[receiver]] = link.bandwidth_bytes_per_s / spec.time_scale
    return [
        Station(
            namespace=namespaces[name],
            address=address[name],
            card_bytes_per_s=None if (rate := nics.get(name)) is None else rate / spec.time_scale,
            peer_bytes_per_s=peers[name],
        )
        for name in address
    ]


def nic_rates(spec: TestbedSpec) -> dict[str, float]:
    """Member -> bytes/s of its NIC in each direction, of those that are limited."""
    rates = {COORDINATOR: spec.coordinator_bandwidth_bytes_per_s}
    rates |= {node.name: node.bandwidth_bytes_per_s for node in spec.local_nodes}
    return {name: rate for name, rate in rates.items() if rate is not None}


def latencies(spec: TestbedSpec) -> dict[str, dict[str, float]]:
    """Sender -> receiver -> seconds that a message is to take beyond its bytes, of those that take any."""
    held: dict[str, dict[str, float]] = {}
    for link in spec.links:
        if link.latency_s > 0:
            for sender, receiver in (link.between, link.between[::-1]):
                held.setdefault(sender, {})[receiver] = link.latency_s
    return held


def shaped_links(spec: TestbedSpec) -> tuple[Link, ...]:
    """Every directed link as the file says it is; none where some pair has neither a link's bandwidth nor a NIC's."""
    nics, held = nic_rates(spec), latencies(spec)
    own = {frozenset(link.between): link.bandwidth_bytes_per_s for link in spec.links}
    links = []
    for src, dst in itertools.permutations(members(spec), 2):
        limits = (own.get(frozenset((src, dst))), nics.get(src), nics.get(dst))
        known = [rate for rate in limits if rate is not None]
        if not known:
            return ()
        latency_s = held.get(src, {}).get(dst, 0.0)
        links.append(Link(src=src, dst=dst, bandwidth_bytes_per_s=min(known), latency_s=latency_s, source=SHAPED))
    return tuple(links)


def _address_facing(address: str) -> str:
    """This machine's own address in the direction of another; no packet is sent to find it."""
    host, _, port = address.rpartition(":")
    try:
        kind, _, _, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise InputError(f"address {address}: cannot be reached from here ({error.strerror})") from error
    return f"[{own}]" if kind == socket.AF_INET6 else own
