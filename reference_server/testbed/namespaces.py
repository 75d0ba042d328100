"""Network namespaces: one per node and one for the coordinator, wired to a bridge that has a namespace of its own.

With the bridge in a namespace, the machine's own interfaces, routes and firewall are neither touched nor in the way,
no address can clash, and to delete the namespaces is to delete everything in them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from helixbench.errors import MeasurementError
from helixbench.reference_server.testbed.shaping import MAX_MTU_BYTES, egress_commands, frames_at_once, mtu_bytes

NETNS_DIR = Path("/run/netns")
_COMMAND_TIMEOUT_S = 30.0
_TRIAL = """
ip link add name trial0 type bridge
ip link add name trial1 type veth peer name trial2
tc qdisc add dev trial1 root handle 1: htb default 0
tc class add dev trial1 parent 1: classid 1:1 htb rate 1mbit quantum 60000
tc filter add dev trial1 parent 1: protocol ip prio 1 u32 match ip dst 10.0.0.1/32 flowid 1:1
"""


class Station(msgspec.Struct, frozen=True, kw_only=True):
    """One namespace on the bridge: its address, and the limits of its network card and towards others.

    ``peer_bytes_per_s`` maps the address of another station to the limit of what is sent there.
    """

    namespace: str
    address: str
    card_bytes_per_s: float | None = None
    peer_bytes_per_s: dict[str, float] = {}


def station_address(index: int) -> str:
    """IPv4 address of the station of that index, in a network that exists inside the namespaces only."""
    high, low = divmod(index + 1, 250)
    return f"10.77.{high}.{low + 1}"


def namespace_file(namespace: str) -> Path:
    """The file that stands for a namespace while it exists."""
    return NETNS_DIR / namespace


def why_no_namespaces() -> str:
    """What keeps this process from making shaped networks; empty where nothing does.

    Tries it, in a namespace that ends with the trial.
    """
    if os.geteuid() != 0:
        return "not root"
    try:
        trial = subprocess.run(
            ["unshare", "--net", "sh", "-e"],
            input=_TRIAL,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        return "unshare of util-linux is not installed"
    except subprocess.TimeoutExpired:
        return "making a network namespace takes too long here"
    if trial.returncode == 0:
        return ""
    if "ip: not found" in trial.stderr or "tc: not found" in trial.stderr:
        return "ip and tc are not installed (package iproute2)"
    return f"no shaped network namespaces here: {(trial.stderr.strip().splitlines() or ['unshare failed'])[-1]}"


def make_network(*, hub: str, stations: Sequence[Station]) -> None:
    """Make the namespaces, the bridge in the hub's, and the shaped links between.

    Raises:
        MeasurementError: a step fails; what was made by then is left for ``delete_namespaces``.
    """
    for namespace in (hub, *(station.namespace for station in stations)):
        _run(["ip", "netns", "add", namespace])
    _run_batch("ip", hub, _hub_commands(stations))
    for station in stations:
        _run_batch("ip", station.namespace, _station_commands(station))
        _run_batch(
            "tc",
            station.namespace,
            egress_commands(
                "eth0", card_bytes_per_s=station.card_bytes_per_s, peer_bytes_per_s=station.peer_bytes_per_s
            ),
        )
    inward = [
        line
        for index, station in enumerate(stations)
        for line in egress_commands(f"port{index}", card_bytes_per_s=station.card_bytes_per_s)
    ]
    _run_batch("tc", hub, inward)


def cut(station: Station, address: str) -> None:
    """From now on nothing that the station sends to that address arrives; connections stay open and silent."""
    _run_batch("ip", station.namespace, [f"route replace blackhole {address}/32"])


def heal(station: Station, address: str) -> None:
    """The station reaches that address again, as it did before it was cut."""
    lines = [f"route del blackhole {address}/32"]
    rate = station.peer_bytes_per_s.get(address)
    if rate is not None:
        lines.append(_peer_route(address, rate, station))
    _run_batch("ip", station.namespace, lines)


def set_rate(station: Station, address: str, factor: float) -> None:
    """The station's link to that address carries ``factor`` times its bandwidth in the testbed file."""
    rates = station.peer_bytes_per_s | {address: factor * station.peer_bytes_per_s[address]}
    lines = egress_commands("eth0", card_bytes_per_s=station.card_bytes_per_s, peer_bytes_per_s=rates)
    changed = [line.replace("class add", "class change", 1) for line in lines if line.startswith("class add")]
    _run_batch("tc", station.namespace, changed)


def delete_namespace(namespace: str) -> None:
    """Delete a namespace and with it the interfaces in it, whether or not it was ever made.

    Raises:
        MeasurementError: it cannot be deleted.
    """
    if namespace_file(namespace).exists():
        _run(["ip", "netns", "delete", namespace])


def _hub_commands(stations: Sequence[Station]) -> list[str]:
    lines = ["link set dev lo up", f"link add name bridge mtu {MAX_MTU_BYTES} type bridge"]
    for index, station in enumerate(stations):
        port, mtu = f"port{index}", mtu_bytes(station.card_bytes_per_s)
        lines += [
            f"link add name {port} mtu {mtu} type veth peer name eth0 mtu {mtu} "
            f"netns {namespace_file(station.namespace)}",
            f"link set dev {port} master bridge up",
        ]
    return [*lines, "link set dev bridge up"]


def _station_commands(station: Station) -> list[str]:
    card = station.card_bytes_per_s or float("inf")
    lines = ["link set dev lo up", f"address add {station.address}/16 dev eth0"]
    slowest = min([*station.peer_bytes_per_s.values(), card])
    if slowest < float("inf"):
        lines.append(f"link set dev eth0 gso_max_segs {frames_at_once(slowest)}")
    lines.append("link set dev eth0 up")
    return lines + [_peer_route(address, rate, station) for address, rate in station.peer_bytes_per_s.items()]


def _peer_route(address: str, rate: float, station: Station) -> str:
    slowest = min(rate, station.card_bytes_per_s or rate)
    return f"route add {address}/32 dev eth0 mtu {mtu_bytes(slowest)}"


def _run_batch(program: str, namespace: str, lines: Sequence[str]) -> None:
    if lines:
        _run([program, "-netns", namespace, "-batch", "-"], text="\n".join(lines) + "\n")


def _environment() -> dict[str, str]:
    """This process's environment, with the folders that hold ip and tc on the PATH: root's may lack them."""
    return os.environ | {"PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"}


def _run(command: Sequence[str], *, text: str = "") -> None:
    try:
        # In a session of its own: a Ctrl-C ends the run, not the command that it happens to be in.
        done = subprocess.run(
            command,
            input=text,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
            start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MeasurementError(f"`{' '.join(command)}` cannot be run: {error}") from error
    if done.returncode != 0 or done.stderr.strip():
        raise MeasurementError(
            f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}; "
            "the testbed needs iproute2 and a kernel with veth, bridge and sch_htb"
        )
