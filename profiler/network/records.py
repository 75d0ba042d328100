"""NetworkProfile: what the links and the network cards of a cluster carry. The file that ``profile net`` writes."""

from __future__ import annotations

import msgspec

from helixbench.errors import MeasurementError
from helixbench.profiler.cluster import Link, MessageTime
from helixbench.profiler.network.nics import Card
from helixbench.records import Provenance


class MeasuredLink(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A directed pair, measured one or more times.

    ``bandwidth_bytes_per_s`` is the median of ``attempts_bytes_per_s``, ``latency_s`` one way: half of the median round
    trip; ``None`` where it could not be measured. ``spread`` and ``retransmitted`` are the last measurement's (see
    ``TcpRate``). ``suspect`` says why the numbers are doubtful though they were measured again; ``note`` what was found
    odd and then confirmed.
    """

    src: str
    dst: str
    bandwidth_bytes_per_s: float | None
    latency_s: float | None
    source: str
    spread: float | None = None
    retransmitted: float | None = None
    attempts_bytes_per_s: tuple[float, ...] = ()
    message_times: tuple[MessageTime, ...] = ()
    suspect: str = ""
    note: str = ""

    def link(self) -> Link:
        """The link of a cluster profile.

        Raises:
            MeasurementError: it has no number to give.
        """
        if self.bandwidth_bytes_per_s is None or self.latency_s is None:
            raise MeasurementError(f"link {self.src} -> {self.dst}: {self.suspect or 'was not measured'}")
        return Link(
            src=self.src,
            dst=self.dst,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            latency_s=self.latency_s,
            source=self.source,
            message_times=self.message_times,
            suspect=self.suspect,
        )


class NetworkProfile(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    omit_defaults=True,
    tag_field="schema",
    tag="helixbench.network/1",
):
    """All links and cards that were measured; ``cut_short`` says why some of them were not."""

    nodes: tuple[str, ...]
    links: tuple[MeasuredLink, ...]
    cards: tuple[Card, ...] = ()
    seconds: float = 0.0
    testbed: str = ""
    cut_short: str = ""
    provenance: Provenance = Provenance()

    def link(self, src: str, dst: str) -> MeasuredLink | None:
        """The link of that pair; ``None`` where it was not measured."""
        return next((link for link in self.links if (link.src, link.dst) == (src, dst)), None)
