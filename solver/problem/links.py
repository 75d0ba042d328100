"""The links and NICs of a cluster profile, looked up by node."""

from __future__ import annotations

from helixbench.profiler.cluster import COORDINATOR, ClusterProfile


class LinkTable:
    """Bandwidth and latency from one node to another: the link's own, else the profile's ``default_link``."""

    def __init__(self, profile: ClusterProfile) -> None:
        self._own = {
            (link.src, link.dst): (link.bandwidth_bytes_per_s, link.latency_s, link.transport_byte_s)
            for link in profile.links
        }
        default = profile.default_link
        self._default = None if default is None else (default.bandwidth_bytes_per_s, default.latency_s, 0.0)
        end = profile.coordinator
        self._nics = {node.name: (node.nic_out_bytes_per_s, node.nic_in_bytes_per_s) for node in profile.nodes}
        self._nics[COORDINATOR] = (end.nic_out_bytes_per_s, end.nic_in_bytes_per_s)

    def bandwidth(self, src: str, dst: str) -> float | None:
        """Bytes/s from ``src`` to ``dst``; ``None`` where they are not connected."""
        found = self._own.get((src, dst), self._default)
        return None if found is None else found[0]

    def latency_s(self, src: str, dst: str) -> float | None:
        """One-way seconds from ``src`` to ``dst``; ``None`` where they are not connected."""
        found = self._own.get((src, dst), self._default)
        return None if found is None else found[1]

    def transport_byte_s(self, src: str, dst: str) -> float:
        """Seconds per byte of the server's transport beyond the link; 0 where none are known."""
        found = self._own.get((src, dst), self._default)
        return 0.0 if found is None else found[2]

    def nics(self, name: str) -> tuple[float | None, float | None]:
        """Bytes/s that the NIC of a node or the coordinator sends and receives; ``None`` where no limit is known."""
        return self._nics[name]
