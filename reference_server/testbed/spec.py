"""The testbed file (TOML): which nodes there are, what each is, and how they are linked."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import COORDINATOR
from helixbench.reference_server.wire.transport import require_address
from helixbench.units import parse_bytes, parse_bytes_per_s

_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_DEVICE = re.compile(r"cpu|cuda:\d+")


class LocalNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node whose agent is started on this machine.

    ``memory_bytes`` is for weights, workspace and KV cache. ``threads`` compute on a CPU, on the cores of ``cpus``
    where it names any. ``bandwidth_bytes_per_s`` is the node's NIC in each direction, ``None`` where that is not
    limited. ``region`` is the place that shares fast links.
    """

    name: str
    memory_bytes: float
    device: str = "cpu"
    threads: int = 1
    cpus: tuple[int, ...] = ()
    bandwidth_bytes_per_s: float | None = None
    region: str = ""


class RemoteNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node whose agent was started by hand and listens at ``address`` (``host:port``)."""

    name: str
    address: str
    region: str = ""


class LinkCap(msgspec.Struct, frozen=True, kw_only=True):
    """Limit between two nodes (or a node and the coordinator), for each direction by itself."""

    between: tuple[str, str]
    bandwidth_bytes_per_s: float


class TestbedSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a testbed file asks for. ``key_file`` is the key that remote agents were started with."""

    local_nodes: tuple[LocalNode, ...] = ()
    remote_nodes: tuple[RemoteNode, ...] = ()
    node_names: tuple[str, ...]
    links: tuple[LinkCap, ...] = ()
    coordinator_bandwidth_bytes_per_s: float | None = None
    key_file: Path | None = None

    @property
    def regions(self) -> dict[str, str]:
        """Node -> its region, of those that say one."""
        local = {node.name: node.region for node in self.local_nodes if node.region}
        return local | {node.name: node.region for node in self.remote_nodes if node.region}

    @property
    def limited_nics(self) -> tuple[str, ...]:
        """Nodes, and the coordinator, whose NIC the testbed limits."""
        nodes = tuple(node.name for node in self.local_nodes if node.bandwidth_bytes_per_s is not None)
        return nodes if self.coordinator_bandwidth_bytes_per_s is None else (*nodes, COORDINATOR)

    @property
    def has_bandwidth_limits(self) -> bool:
        """Whether any network card or link is to be limited."""
        cards = [self.coordinator_bandwidth_bytes_per_s, *(node.bandwidth_bytes_per_s for node in self.local_nodes)]
        return bool(self.links) or any(card is not None for card in cards)


def load_testbed(path: Path) -> TestbedSpec:
    """Read a testbed file.

    Raises:
        InputError: not TOML, an unknown key, a wrong type or value, or names that do not fit together.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file ({error})") from error
    return testbed_from_tree(tree, origin=str(path), folder=path.parent)


def testbed_from_tree(tree: dict[str, Any], *, origin: str, folder: Path) -> TestbedSpec:
    """The testbed that a TOML tree asks for.

    Args:
        tree: as ``tomllib`` reads it.
        origin: the file to name in errors.
        folder: what ``key`` is relative to.

    Raises:
        InputError: an unknown key, a wrong type or value, or names that do not fit together.
    """
    return _Reader(origin, tree).spec(folder=folder)


class _NodeToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    memory: str | None = None
    device: str | None = None
    threads: Annotated[int, msgspec.Meta(ge=1)] | None = None
    cpus: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] | None = None
    bandwidth: str | None = None
    address: str | None = None
    region: str = ""


class _NetworkToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    bandwidth: str | None = None


class _LinkToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    between: Annotated[tuple[str, ...], msgspec.Meta(min_length=2, max_length=2)]
    bandwidth: str


class _CoordinatorToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    bandwidth: str | None = None


class _TestbedToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    node: Annotated[tuple[_NodeToml, ...], msgspec.Meta(min_length=1)]
    network: _NetworkToml = _NetworkToml()
    link: tuple[_LinkToml, ...] = ()
    coordinator: _CoordinatorToml = _CoordinatorToml()
    key: str | None = None


class _Reader:
    """Turns the TOML tree into a spec; every refusal names file, field, value and remedy."""

    def __init__(self, origin: str, tree: dict[str, Any]) -> None:
        self._origin = origin
        self._tree = tree

    def spec(self, *, folder: Path) -> TestbedSpec:
        try:
            toml = msgspec.convert(self._tree, _TestbedToml)
        except msgspec.ValidationError as error:
            raise InputError(f"{self._origin}: {_with_value(str(error), self._tree)}") from error
        self._check_names(toml)
        network = self._rate("network.bandwidth", toml.network.bandwidth)
        nodes = [self._node(f"node[{index}]", node, network) for index, node in enumerate(toml.node)]
        remote = tuple(node for node in nodes if isinstance(node, RemoteNode))
        if remote and toml.key is None:
            self._refuse("key", None, f"node {remote[0].name} has an address; say `key = FILE`, its agent's --key file")
        if toml.key is not None and not remote:
            self._refuse("key", toml.key, "no node has an address, and a key is made for agents here; take it out")
        own = self._rate("coordinator.bandwidth", toml.coordinator.bandwidth)
        return TestbedSpec(
            local_nodes=tuple(node for node in nodes if isinstance(node, LocalNode)),
            remote_nodes=remote,
            node_names=tuple(node.name for node in nodes),
            links=self._links(toml, {node.name for node in remote}),
            coordinator_bandwidth_bytes_per_s=network if own is None else own,
            key_file=None if toml.key is None else self._key_file(folder / toml.key),
        )

    def _check_names(self, toml: _TestbedToml) -> None:
        seen: set[str] = set()
        for index, node in enumerate(toml.node):
            field = f"node[{index}].name"
            if not _NODE_NAME.fullmatch(node.name):
                self._refuse(field, node.name, "use letters, digits, `.`, `_` and `-`, 63 at most")
            if node.name == COORDINATOR:
                self._refuse(field, node.name, "that is the coordinator's name; its NIC goes under [coordinator]")
            if node.name in seen:
                self._refuse(field, node.name, "another node has this name; names must differ")
            seen.add(node.name)

    def _node(self, field: str, node: _NodeToml, network: float | None) -> LocalNode | RemoteNode:
        if node.address is not None:
            for key in ("memory", "device", "threads", "cpus", "bandwidth"):
                if (value := getattr(node, key)) is not None:
                    self._refuse(f"{field}.{key}", value, f"the agent at {node.address} owns this; take it out")
            return RemoteNode(
                name=node.name, address=self._address(f"{field}.address", node.address), region=node.region
            )
        device = node.device or "cpu"
        if not _DEVICE.fullmatch(device):
            self._refuse(f"{field}.device", device, 'need "cpu" or "cuda:N"')
        for key in ("threads", "cpus"):
            if device != "cpu" and (value := getattr(node, key)) is not None:
                self._refuse(f"{field}.{key}", value, f"only a node on cpu has it; with {device} take it out")
        if node.memory is None:
            self._refuse(
                f"{field}.memory", None, f"node {node.name} needs the `memory` that it may use, or an `address`"
            )
        own = self._rate(f"{field}.bandwidth", node.bandwidth)
        return LocalNode(
            name=node.name,
            memory_bytes=self._quantity(f"{field}.memory", node.memory, parse_bytes),
            device=device,
            threads=node.threads or 1,
            cpus=node.cpus or (),
            bandwidth_bytes_per_s=network if own is None else own,
            region=node.region,
        )

    def _links(self, toml: _TestbedToml, remote: set[str]) -> tuple[LinkCap, ...]:
        known = {COORDINATOR, *(node.name for node in toml.node)}
        seen: set[frozenset[str]] = set()
        links = []
        for index, link in enumerate(toml.link):
            field = f"link[{index}].between"
            for end in link.between:
                if end not in known:
                    self._refuse(field, end, f"no such node; there are {', '.join(sorted(known))}")
                if end in remote:
                    self._refuse(field, end, "links of a node with an address are as they are; take this one out")
            first, second = link.between
            if first == second:
                self._refuse(field, list(link.between), "a link needs two different ends")
            if frozenset(link.between) in seen:
                self._refuse(field, list(link.between), "stands twice; a link holds for both directions")
            seen.add(frozenset(link.between))
            rate = self._quantity(f"link[{index}].bandwidth", link.bandwidth, parse_bytes_per_s)
            links.append(LinkCap(between=(first, second), bandwidth_bytes_per_s=rate))
        return tuple(links)

    def _rate(self, field: str, text: str | None) -> float | None:
        return None if text is None else self._quantity(field, text, parse_bytes_per_s)

    def _quantity(self, field: str, text: str, parse: Callable[[str], float]) -> float:
        try:
            return parse(text)
        except ValueError as error:
            self._refuse(field, text, str(error))

    def _address(self, field: str, address: str) -> str:
        try:
            return require_address(address)
        except ValueError as error:
            self._refuse(field, address, str(error))

    def _key_file(self, path: Path) -> Path:
        if not path.is_file():
            self._refuse("key", str(path), "no such file; copy the one that the agents were started with")
        return path

    def _refuse(self, field: str, value: object, problem: str) -> NoReturn:
        shown = "is missing" if value is None else f"is {value!r}"
        raise InputError(f"{self._origin}: {field} {shown}: {problem}")


def _with_value(message: str, tree: object) -> str:
    """A validation message of msgspec with the offending value: it names only path and types."""
    match = re.search(r"`\$(?P<path>[^`]*)`$", message)
    if match is None:
        return message
    value = tree
    steps = re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", match["path"])
    for key, index in steps:
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and index:
            value = value[int(index)]
        else:
            return message
    return f"{message}, which is {value!r}"
