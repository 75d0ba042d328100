"""Configuration of a profile: what is measured, and for how long."""

from __future__ import annotations

from pathlib import Path

import msgspec

from helixbench.profiler.cluster import Link
from helixbench.reference_server.testbed.emulation import Timing

SELF, RING = "self", "ring"
"""Names of a node that profiles itself in its own pipelines: as what runs a batch, and as the peer it goes on to."""


class NetworkConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How thoroughly links and NICs are measured.

    ``seconds`` of bandwidth per attempt at a link, ``nic_seconds`` with all links of a node busy; whole seconds,
    because iperf3 takes no others. Messages of ``message_bytes`` are timed unless one takes over ``message_limit_s``.
    ``one_pair_at_a_time`` is for networks in which pairs of different nodes share more than NICs.
    """

    seconds: float = 1.0
    nic_seconds: float = 2.0
    message_bytes: tuple[int, ...] = (1 << 10, 1 << 14, 1 << 18)
    message_limit_s: float = 0.3
    max_attempts: int = 4
    one_pair_at_a_time: bool = False


DEFAULT_RANGES = {"cuda": (1024, 4096), "cpu": (128, 512), "emulated": (128, 512)}
"""Kind of device -> most tokens of an iteration and longest context that are measured where neither is given."""


class ProfileConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A profile of a cluster, or with ``is_network_only`` of its links and NICs.

    ``compute_of`` is the profile whose compute is then kept. ``limited_nics`` are nodes (or the coordinator) whose NIC
    the testbed limits: where a node's links could not be measured at once, the best of them stands for it. ``testbed``
    is the line on what the testbed isolates, ``command`` the user's. ``regions`` maps nodes to the testbed's regions.
    ``timing`` is the testbed's. Ranges that are not given are those of the node's device (``DEFAULT_RANGES``). Where
    ``shaped_links`` are given, they and ``shaped_nics`` (node -> bytes/s) are what the testbed's shaping makes of links
    and NICs, and neither is measured.
    """

    model: str
    dtype: str
    addresses: dict[str, str]
    key_file: Path
    output: Path
    testbed: str
    limited_nics: tuple[str, ...]
    command: str = ""
    regions: dict[str, str] = {}
    max_batch_tokens: int | None = None
    max_context_tokens: int | None = None
    budget_s: float = 100.0
    network: NetworkConfig = NetworkConfig()
    is_network_only: bool = False
    compute_of: Path | None = None
    timing: Timing = Timing()
    shaped_links: tuple[Link, ...] = ()
    shaped_nics: dict[str, float] = {}


class NodeProfileConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A profile of this machine's own device. ``threads`` as in ``AgentConfig``; ``command`` is the user's."""

    model: str
    dtype: str
    name: str
    device: str = "cpu"
    memory_bytes: float | None = None
    threads: int | None = None
    max_batch_tokens: int | None = None
    max_context_tokens: int | None = None
    budget_s: float = 100.0
    command: str = ""
