"""ClusterProfile: what every node and link of a cluster can do. The file ``cluster.json``."""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from helixbench.profiler.cost.measured import MeasuredCost
from helixbench.records import Provenance, require_unique

COORDINATOR = "coordinator"


def _require_positive(field: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{field}: need a finite value > 0, got {value}")


def _require_not_negative(field: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{field}: need a finite value >= 0, got {value}")


def _require_nic(name: str, *values: float | None) -> None:
    for value in values:
        if value is not None:
            _require_positive(f"nic_*_bytes_per_s of {name}", value)


class ModelFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Sizes of the model that the cluster was profiled for.

    ``activation_bytes_per_token`` crosses a link between nodes, ``token_bytes`` one to or from the coordinator.
    ``embedding_bytes`` and ``head_bytes`` lie on the node that holds the first or the last layer. ``digest`` tells two
    models of one name apart.
    """

    name: str
    num_layers: int
    activation_bytes_per_token: float
    token_bytes: float
    layer_weight_bytes: float
    kv_bytes_per_token_per_layer: float
    embedding_bytes: float = 0.0
    head_bytes: float = 0.0
    dtype: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers: need >= 1, got {self.num_layers}")
        for name in (
            "activation_bytes_per_token",
            "token_bytes",
            "layer_weight_bytes",
            "kv_bytes_per_token_per_layer",
        ):
            _require_positive(name, getattr(self, name))
        _require_not_negative("embedding_bytes", self.embedding_bytes)
        _require_not_negative("head_bytes", self.head_bytes)


STAGE_TIMES_FACT = "stage_times"
"""Among the facts of an emulated device: where its stage times come from."""


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What runs the layers. ``memory_bytes`` is what weights, workspace and KV cache may use together.

    ``facts`` holds what the driver or the OS says (clocks, power limit, driver, cores), for people and for comparing.
    """

    kind: Literal["cuda", "cpu", "emulated"]
    name: str
    memory_bytes: float
    facts: dict[str, str | float] = {}

    def __post_init__(self) -> None:
        _require_positive("memory_bytes", self.memory_bytes)

    @property
    def label(self) -> str:
        """The name as it is shown: an emulated device says that it is, and where its stage times come from."""
        if self.kind != "emulated":
            return self.name
        origin = self.facts.get(STAGE_TIMES_FACT)
        return f"{self.name} (emulated, {origin})" if origin else f"{self.name} (emulated)"


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One node: its device, its network card, and either a measured cost or a capacity table.

    ``capacity_tokens_per_s[k-1]`` is the capacity with ``k`` layers held, ``k`` up to ``max_layers``. ``region`` is the
    place that shares fast links, ``versions`` the libraries that it was measured with. ``nic_source`` says how the card
    was measured. Of the nodes with one ``exclusive_group`` a plan uses one at most: they are the same devices in
    several forms, such as the tensor-parallel sizes of one machine.
    """

    name: str
    device: Device
    max_layers: int
    nic_out_bytes_per_s: float | None = None
    nic_in_bytes_per_s: float | None = None
    nic_source: str = ""
    capacity_tokens_per_s: tuple[float, ...] | None = None
    cost: MeasuredCost | None = None
    region: str = ""
    exclusive_group: str = ""
    versions: dict[str, str] = {}

    def __post_init__(self) -> None:
        if not self.name or self.name == COORDINATOR:
            raise ValueError(f"name: need a name other than {COORDINATOR!r} (that one goes under `coordinator`)")
        if self.max_layers < 0:
            raise ValueError(f"max_layers of {self.name}: need >= 0, got {self.max_layers}")
        if (self.cost is None) == (self.capacity_tokens_per_s is None):
            raise ValueError(f"node {self.name}: need exactly one of `cost` and `capacity_tokens_per_s`")
        table = self.capacity_tokens_per_s
        if table is not None:
            if len(table) != self.max_layers:
                raise ValueError(
                    f"capacity_tokens_per_s of {self.name}: need {self.max_layers} values "
                    f"(one per number of layers held), got {len(table)}"
                )
            for value in table:
                _require_positive(f"capacity_tokens_per_s of {self.name}", value)
        _require_nic(self.name, self.nic_out_bytes_per_s, self.nic_in_bytes_per_s)


class Coordinator(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The coordinator: where requests enter and tokens leave. A node too, with its own time per token.

    ``message_s`` is spent on each message of a node's iteration, ``token_s`` on each output token in it and
    ``request_s`` once per request; ``None`` where that was not measured.
    """

    nic_out_bytes_per_s: float | None = None
    nic_in_bytes_per_s: float | None = None
    nic_source: str = ""
    message_s: float | None = None
    token_s: float | None = None
    request_s: float | None = None
    region: str = ""

    def __post_init__(self) -> None:
        _require_nic(COORDINATOR, self.nic_out_bytes_per_s, self.nic_in_bytes_per_s)


class MessageTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds that a message of that size takes one way over the server's own transport, on an idle link."""

    message_bytes: int
    one_way_s: float


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A directed link. ``latency_s`` is one way.

    ``transport_byte_s`` is what the server's transport takes per byte beyond the link: a message is encrypted before
    its first byte leaves, and decrypted after its last has arrived. It delays messages and takes no bandwidth.
    ``message_times`` are for people and for checking ``latency_s + bytes / bandwidth_bytes_per_s``. ``source`` says
    what measured the bandwidth.
    """

    src: str
    dst: str
    bandwidth_bytes_per_s: float
    latency_s: float = 0.0
    transport_byte_s: float = 0.0
    source: str = ""
    message_times: tuple[MessageTime, ...] = ()

    def __post_init__(self) -> None:
        _require_positive(f"bandwidth_bytes_per_s of {self.src} -> {self.dst}", self.bandwidth_bytes_per_s)
        if self.src == self.dst:
            raise ValueError(f"link {self.src} -> {self.dst}: need two different nodes")
        _require_not_negative(f"latency_s of {self.src} -> {self.dst}", self.latency_s)
        _require_not_negative(f"transport_byte_s of {self.src} -> {self.dst}", self.transport_byte_s)


class DefaultLink(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bandwidth and one-way latency of every pair that has no link of its own."""

    bandwidth_bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        _require_positive("default_link.bandwidth_bytes_per_s", self.bandwidth_bytes_per_s)
        _require_not_negative("default_link.latency_s", self.latency_s)


class ClusterProfile(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    omit_defaults=True,
    tag_field="schema",
    tag="helixbench.cluster/2",
):
    """The measured cluster. A pair of nodes without a link and without ``default_link`` is not connected.

    A file of version 1 is read where it holds nothing that was removed: all that have no measured cost.
    """

    reads: ClassVar[tuple[str, ...]] = ("helixbench.cluster/1",)
    remade_by: ClassVar[str] = "helixbench profile"

    model: ModelFacts
    nodes: tuple[Node, ...]
    links: tuple[Link, ...] = ()
    default_link: DefaultLink | None = None
    coordinator: Coordinator = Coordinator()
    testbed: str = ""
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ValueError("nodes: need at least one node")
        require_unique([node.name for node in self.nodes], field="nodes")
        require_unique([f"{link.src} -> {link.dst}" for link in self.links], field="links")
        known = {COORDINATOR, *(node.name for node in self.nodes)}
        for link in self.links:
            for end in (link.src, link.dst):
                if end not in known:
                    raise ValueError(f"links: {link.src} -> {link.dst} names {end!r}, which is no node")

    def node(self, name: str) -> Node:
        """The node of that name; ``KeyError`` where there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def link(self, src: str, dst: str) -> Link | None:
        """The link that carries ``src -> dst``, its own or the default one; ``None`` where they are not connected."""
        for link in self.links:
            if link.src == src and link.dst == dst:
                return link
        if self.default_link is None:
            return None
        return Link(
            src=src,
            dst=dst,
            bandwidth_bytes_per_s=self.default_link.bandwidth_bytes_per_s,
            latency_s=self.default_link.latency_s,
        )

    @property
    def is_measured(self) -> bool:
        """Whether every node has a measured cost."""
        return all(node.cost is not None for node in self.nodes)

    def without_samples(self) -> ClusterProfile:
        """The same without what the costs were fitted to: all that predictions need."""
        replace = msgspec.structs.replace
        nodes = tuple(
            node if node.cost is None else replace(node, cost=replace(node.cost, samples=(), quality=None))
            for node in self.nodes
        )
        return replace(self, nodes=nodes, links=tuple(replace(link, message_times=()) for link in self.links))

    def bytes_per_token(self, src: str, dst: str) -> float:
        """Bytes that one token puts on the link: its id to and from the coordinator, its activations elsewhere."""
        is_edge = COORDINATOR in (src, dst)
        return self.model.token_bytes if is_edge else self.model.activation_bytes_per_token
