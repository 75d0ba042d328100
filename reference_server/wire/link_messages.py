"""What coordinator and agents say to each other to measure links."""

from __future__ import annotations

import msgspec

from helixbench.profiler.cluster import MessageTime


class IperfServe(msgspec.Struct, frozen=True, tag="iperf-serve"):
    """Start iperf3 servers, each for one test; what an earlier one of these started is ended."""

    count: int = 1


class IperfServing(msgspec.Struct, frozen=True, tag="iperf-serving"):
    """The iperf3 servers listen on these ports of the agent's host; none where iperf3 is not installed there.

    None either where one of them did not come to listen, which ``error`` says then.
    """

    ports: tuple[int, ...]
    error: str = ""


class MeasureLink(msgspec.Struct, frozen=True, tag="measure-link"):
    """Measure to a peer agent: over the server's own transport, and by iperf3 to its server at ``iperf_port``.

    ``iperf_port`` is ``None`` where iperf3 is missing at the other end: the transport measures bandwidth then, too.
    Where it is there but does not serve, ``iperf_problem`` says why, and bandwidth is not measured. ``reverse``
    measures what comes from the peer instead of what goes there. Messages of ``message_bytes`` are timed over the
    transport, those that take no more than ``message_limit_s``. ``rough_bytes_per_s`` is what the link is thought to
    carry, where that is known.
    """

    address: str
    iperf_port: int | None
    seconds: float
    reverse: bool = False
    message_bytes: tuple[int, ...] = ()
    message_limit_s: float = 1.0
    rough_bytes_per_s: float | None = None
    iperf_problem: str = ""


class LinkMeasured(msgspec.Struct, frozen=True, tag="link-measured", kw_only=True):
    """One direction of a pair. ``source`` says what measured the bandwidth; see ``TcpRate`` for the rest.

    ``bandwidth_bytes_per_s`` and ``latency_s`` (one way) are ``None`` where ``error`` says why they were not measured.
    """

    bandwidth_bytes_per_s: float | None
    latency_s: float | None
    source: str = ""
    spread: float | None = None
    retransmitted: float | None = None
    message_times: tuple[MessageTime, ...] = ()
    error: str = ""


class Flow(msgspec.Struct, frozen=True, array_like=True):
    """One of several iperf3 tests at once: with the server at that host and port, from there where ``reverse``.

    ``rough_bytes_per_s`` is what it is thought to carry beside the others.
    """

    host: str
    port: int
    reverse: bool
    rough_bytes_per_s: float | None = None


class MeasureFlows(msgspec.Struct, frozen=True, tag="measure-flows"):
    """Run these iperf3 tests, all at the same time."""

    flows: tuple[Flow, ...]
    seconds: float


class FlowsMeasured(msgspec.Struct, frozen=True, tag="flows-measured"):
    """Bytes/s of each flow while all of them ran; none of them where ``error`` says what failed."""

    bytes_per_s: tuple[float, ...]
    error: str = ""
