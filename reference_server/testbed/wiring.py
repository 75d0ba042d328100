"""Who is on the testbed's network: at which address, and with which limits."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from helixbench.errors import InputError
from helixbench.profiler.cluster import COORDINATOR
from helixbench.reference_server.testbed.namespaces import Station, station_address
from helixbench.reference_server.testbed.spec import TestbedSpec

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
    """The stations to make, one per member, given member -> its namespace."""
    address = isolated_hosts(spec)
    cards = {node.name: node.bandwidth_bytes_per_s for node in spec.local_nodes}
    cards[COORDINATOR] = spec.coordinator_bandwidth_bytes_per_s
    peers: dict[str, dict[str, float]] = {name: {} for name in address}  # sender -> receiver's address -> limit
    for link in spec.links:
        for sender, receiver in (link.between, link.between[::-1]):
            peers[sender][address[receiver]] = link.bandwidth_bytes_per_s
    return [
        Station(
            namespace=namespaces[name],
            address=address[name],
            card_bytes_per_s=cards[name],
            peer_bytes_per_s=peers[name],
        )
        for name in address
    ]


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
