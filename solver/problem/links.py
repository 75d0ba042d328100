"""The links of a cluster profile, looked up by their two ends."""

from __future__ import annotations

from helixbench.profiler.cluster import ClusterProfile


class LinkTable:
    """Bandwidth and latency from one node to another: the link's own, else the profile's ``default_link``."""

    def __init__(self, profile: ClusterProfile) -> None:
        self._own = {(link.src, link.dst): (link.bandwidth_bytes_per_s, link.latency_s) for link in profile.links}
        default = profile.default_link
        self._default = None if default is None else (default.bandwidth_bytes_per_s, default.latency_s)

    def bandwidth(self, src: str, dst: str) -> float | None:
        """Bytes/s from ``src`` to ``dst``; ``None`` where they are not connected."""
        found = self._own.get((src, dst), self._default)
        return None if found is None else found[0]

    def latency_s(self, src: str, dst: str) -> float | None:
        """One-way seconds from ``src`` to ``dst``; ``None`` where they are not connected."""
        found = self._own.get((src, dst), self._default)
        return None if found is None else found[1]
