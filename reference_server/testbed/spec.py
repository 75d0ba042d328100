"""The testbed file (TOML): which nodes there are, what each is, and how they are linked."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import COORDINATOR
from helixbench.profiler.emulated_device import EmulatedDevice, device_path, load_device
from helixbench.reference_server.wire.transport import require_address
from helixbench.units import parse_bytes, parse_bytes_per_s, parse_seconds

_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_DEVICE = re.compile(r"cpu|cuda:\d+")
_EMULATED = "emulated:"


class LocalNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node whose agent is started on this machine.

    ``memory_bytes`` is for weights, workspace and KV cache. ``device`` computes: with ``threads`` where it is a CPU, on
    the cores of ``cpus`` where that names any. ``emulated`` is the device whose times the node keeps instead of its
    own, read from ``device_file``. ``bandwidth_bytes_per_s`` is the node's NIC in each direction, ``None`` where that
    is not limited. ``region`` is the place that shares fast links.
    """

    name: str
    memory_bytes: float
    device: str = "cpu"
    threads: int = 1
    cpus: tuple[int, ...] = ()
    emulated: EmulatedDevice | None = None
    device_file: Path | None = None
    bandwidth_bytes_per_s: float | None = None
    region: str = ""


class RemoteNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node whose agent was started by hand and listens at ``address`` (``host:port``)."""

    name: str
    address: str
    region: str = ""


class LinkSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Link between two nodes (or a node and the coordinator), the same in each direction.

    ``bandwidth_bytes_per_s`` is ``None`` where only NICs limit it. ``latency_s`` is one way.
    """

    between: tuple[str, str]
    bandwidth_bytes_per_s: float | None = None
    latency_s: float = 0.0


class TestbedSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a testbed file asks for. ``key_file`` is the key that remote agents were started with.

    All rates and times are those of the devices. ``time_scale`` seconds here stand for one of theirs: computing, links
    and latencies take that many times as long.
    """

    local_nodes: tuple[LocalNode, ...] = ()
    remote_nodes: tuple[RemoteNode, ...] = ()
    node_names: tuple[str, ...]
    links: tuple[LinkSpec, ...] = ()
    coordinator_bandwidth_bytes_per_s: float | None = None
    coordinator_region: str = ""
    key_file: Path | None = None
    time_scale: float = 1.0

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
        limits = [link.bandwidth_bytes_per_s for link in self.links]
        return any(limit is not None for limit in (*limits, *cards))

    @property
    def is_emulated(self) -> bool:
        """Whether every node keeps the times of an emulated device."""
        return not self.remote_nodes and all(node.emulated is not None for node in self.local_nodes)

    @property
    def has_latencies(self) -> bool:
        """Whether messages are to arrive later than they do by themselves."""
        return any(link.latency_s > 0 for link in self.links)


SHIPPED = Path(__file__).with_name("shipped")
"""Testbeds that come with helixbench; each can be given by its name instead of a file."""

MACHINES_OWN = "two-cpus"
"""The one of them that takes nothing but this machine's processor."""


def testbed_path(named: Path) -> Path:
    """The file of a testbed: that file, or one that comes with helixbench by its name.

    Raises:
        InputError: neither a file nor a known name.
    """
    shipped = SHIPPED / f"{named}.toml"
    if len(named.parts) == 1 and not named.suffix and not named.exists():
        if shipped.is_file():
            return shipped
        known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
        raise InputError(f"testbed {named}: no such file, and none of {known}")
    return named


def load_testbed(path: Path) -> TestbedSpec:
    """Read a testbed file, or the testbed of that name that comes with helixbench.

    Raises:
        InputError: not TOML, an unknown key, a wrong type or value, or names that do not fit together.
    """
    path = testbed_path(path)
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
        folder: what ``key`` and device files are relative to.

    Raises:
        InputError: an unknown key, a wrong type or value, or names that do not fit together.
    """
    return _Reader(origin, tree, folder).spec()


class _NodeToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    count: Annotated[int, msgspec.Meta(ge=1)] | None = None
    memory: str | None = None
    device: str | None = None
    threads: Annotated[int, msgspec.Meta(ge=1)] | None = None
    cpus: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] | None = None
    bandwidth: str | None = None
    address: str | None = None
    region: str = ""


class _NetworkToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    bandwidth: str | None = None
    latency: str | None = None


_Two = Annotated[tuple[str, ...], msgspec.Meta(min_length=2, max_length=2)]


class _LinkToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    between: _Two | None = None
    between_regions: _Two | None = None
    bandwidth: str | None = None
    latency: str | None = None


class _CoordinatorToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    bandwidth: str | None = None
    region: str = ""


class _TestbedToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    node: Annotated[tuple[_NodeToml, ...], msgspec.Meta(min_length=1)]
    network: _NetworkToml = _NetworkToml()
    link: tuple[_LinkToml, ...] = ()
    coordinator: _CoordinatorToml = _CoordinatorToml()
    key: str | None = None
    time_scale: float = 1.0


class _Reader:
    """Turns the TOML tree into a spec; every refusal names file, field, value and remedy."""

    def __init__(self, origin: str, tree: dict[str, Any], folder: Path) -> None:
        self._origin = origin
        self._tree = tree
        self._folder = folder

    def spec(self) -> TestbedSpec:
        try:
            toml = msgspec.convert(self._tree, _TestbedToml)
        except msgspec.ValidationError as error:
            raise InputError(f"{self._origin}: {_with_value(str(error), self._tree)}") from error
        self._check_names(toml)
        network = self._rate("network.bandwidth", toml.network.bandwidth)
        nodes = [one for index, node in enumerate(toml.node) for one in self._nodes(f"node[{index}]", node, network)]
        remote = tuple(node for node in nodes if isinstance(node, RemoteNode))
        if remote and toml.key is None:
            self._refuse("key", None, f"node {remote[0].name} has an address; say `key = FILE`, its agent's --key file")
        if toml.key is not None and not remote:
            self._refuse("key", toml.key, "no node has an address, and a key is made for agents here; take it out")
        own = self._rate("coordinator.bandwidth", toml.coordinator.bandwidth)
        spec = TestbedSpec(
            local_nodes=tuple(node for node in nodes if isinstance(node, LocalNode)),
            remote_nodes=remote,
            node_names=tuple(node.name for node in nodes),
            coordinator_bandwidth_bytes_per_s=network if own is None else own,
            coordinator_region=toml.coordinator.region,
            key_file=None if toml.key is None else self._key_file(self._folder / toml.key),
            time_scale=toml.time_scale,
        )
        if not 0 < toml.time_scale < float("inf"):
            self._refuse("time_scale", toml.time_scale, "need a finite number > 0, like 4.0")
        if toml.time_scale != 1 and not spec.is_emulated:
            self._refuse(
                "time_scale", toml.time_scale, "only emulated devices can be slowed down, and not all nodes are"
            )
        return msgspec.structs.replace(spec, links=tuple(self._links(toml, spec).values()))

    def _check_names(self, toml: _TestbedToml) -> None:
        seen: set[str] = set()
        for index, node in enumerate(toml.node):
            field = f"node[{index}].name"
            for name in _names(node):
                if not _NODE_NAME.fullmatch(name):
                    self._refuse(field, name, "use letters, digits, `.`, `_` and `-`, 63 at most")
                if name == COORDINATOR:
                    self._refuse(field, name, "that is the coordinator's name; its NIC goes under [coordinator]")
                if name in seen:
                    self._refuse(field, name, "another node has this name; names must differ")
                seen.add(name)

    def _nodes(self, field: str, node: _NodeToml, network: float | None) -> list[LocalNode] | list[RemoteNode]:
        if node.address is not None:
            for key in ("count", "memory", "device", "threads", "cpus", "bandwidth"):
                if (value := getattr(node, key)) is not None:
                    self._refuse(f"{field}.{key}", value, f"the agent at {node.address} owns this; take it out")
            address = self._address(f"{field}.address", node.address)
            return [RemoteNode(name=node.name, address=address, region=node.region)]
        local = self._local(field, node, network)
        return [msgspec.structs.replace(local, name=name) for name in _names(node)]

    def _local(self, field: str, node: _NodeToml, network: float | None) -> LocalNode:
        device = node.device or "cpu"
        is_emulated = device.startswith(_EMULATED)
        if not is_emulated and not _DEVICE.fullmatch(device):
            self._refuse(f"{field}.device", device, 'need "cpu", "cuda:N", "emulated:NAME" or "emulated:FILE.json"')
        for key in ("threads", "cpus"):
            if device != "cpu" and (value := getattr(node, key)) is not None:
                self._refuse(f"{field}.{key}", value, f"only a node on cpu has it; with {device} take it out")
        emulated, device_file = None, None
        if is_emulated:
            emulated, device_file = self._device(f"{field}.device", device.removeprefix(_EMULATED))
        if node.memory is None and emulated is None:
            self._refuse(
                f"{field}.memory", None, f"node {node.name} needs the `memory` that it may use, or an `address`"
            )
        memory = None if node.memory is None else self._quantity(f"{field}.memory", node.memory, parse_bytes)
        own = self._rate(f"{field}.bandwidth", node.bandwidth)
        rates = (own, network, emulated.nic_bytes_per_s if emulated is not None else None)
        return LocalNode(
            name=node.name,
            memory_bytes=memory or (emulated.memory_bytes if emulated is not None else 0.0),
            device="cpu" if is_emulated else device,
            threads=node.threads or 1,
            cpus=node.cpus or (),
            emulated=emulated,
            device_file=device_file,
            bandwidth_bytes_per_s=next((rate for rate in rates if rate is not None), None),
            region=node.region,
        )

    def _device(self, field: str, name: str) -> tuple[EmulatedDevice, Path]:
        try:
            path = device_path(name, folder=self._folder)
            return load_device(path), path.resolve()
        except InputError as error:
            raise InputError(f"{self._origin}: {field}: {error}") from error

    def _links(self, toml: _TestbedToml, spec: TestbedSpec) -> dict[frozenset[str], LinkSpec]:
        """Ends -> their link. One between two nodes goes before one between regions, that before the network's."""
        latency = self._latency("network.latency", toml.network.latency)
        local = (COORDINATOR, *(node.name for node in spec.local_nodes))
        pairs: dict[frozenset[str], LinkSpec] = {}
        if latency:
            pairs = {
                frozenset(ends): LinkSpec(between=ends, latency_s=latency) for ends in itertools.combinations(local, 2)
            }
        named: dict[frozenset[str], int] = {}  # ends, or regions -> which entry names them
        for is_regions in (True, False):
            for index, link in enumerate(toml.link):
                if (link.between is None) != is_regions:
                    continue
                field = f"link[{index}]"
                if link.between is not None and link.between_regions is not None:
                    self._refuse(f"{field}.between", list(link.between), "say `between` or `between_regions`")
                rate = self._rate(f"{field}.bandwidth", link.bandwidth)
                own = latency if link.latency is None else self._latency(f"{field}.latency", link.latency)
                if rate is None and link.latency is None:
                    self._refuse(f"{field}.bandwidth", None, "a link needs `bandwidth`, `latency` or both")
                for ends in self._ends(field, link, spec):
                    pairs[frozenset(ends)] = LinkSpec(between=ends, bandwidth_bytes_per_s=rate, latency_s=own)
                what = frozenset(link.between or link.between_regions or ())
                if what in named:
                    self._refuse(f"{field}", sorted(what), f"duplicate of link[{named[what]}]; a link holds both ways")
                named[what] = index
        return pairs

    def _ends(self, field: str, link: _LinkToml, spec: TestbedSpec) -> Iterator[tuple[str, str]]:
        """The pairs that an entry is for."""
        remote = {node.name for node in spec.remote_nodes}
        if link.between is not None:
            known = {COORDINATOR, *spec.node_names}
            first, second = link.between
            for end in link.between:
                if end not in known:
                    self._refuse(f"{field}.between", end, f"no such node; there are {', '.join(sorted(known))}")
            if first == second:
                self._refuse(f"{field}.between", list(link.between), "a link needs two different ends")
            yield self._shaped(f"{field}.between", (first, second), remote)
        elif link.between_regions is not None:
            of_region: dict[str, list[str]] = {}
            for name, region in ({COORDINATOR: spec.coordinator_region} | spec.regions).items():
                of_region.setdefault(region, []).append(name)
            for region in link.between_regions:
                if region not in of_region or not region:
                    known_regions = ", ".join(sorted(filter(None, of_region))) or "none"
                    self._refuse(f"{field}.between_regions", region, f"no such region; there are {known_regions}")
            first, second = link.between_regions
            for a, b in itertools.product(of_region[first], of_region[second]):
                if a != b:
                    yield self._shaped(f"{field}.between_regions", (a, b), remote)
        else:
            self._refuse(f"{field}.between", None, "say `between` or `between_regions`")

    def _shaped(self, field: str, ends: tuple[str, str], remote: set[str]) -> tuple[str, str]:
        for end in ends:
            if end in remote:
                self._refuse(field, end, "links of a node with an address are as they are; take this one out")
        return ends

    def _latency(self, field: str, text: str | None) -> float:
        return 0.0 if text is None else self._quantity(field, text, parse_seconds)

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


def _names(node: _NodeToml) -> tuple[str, ...]:
    """The names of the nodes that an entry stands for."""
    return (node.name,) if node.count is None else tuple(f"{node.name}-{index}" for index in range(node.count))


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
