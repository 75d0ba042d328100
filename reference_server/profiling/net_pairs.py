"""Which end of a pair does what, and what its measurements come to. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from helixbench.profiler.cluster import COORDINATOR
from helixbench.profiler.network.nics import Direction
from helixbench.profiler.network.records import MeasuredLink
from helixbench.profiler.network.schedule import Pair
from helixbench.profiler.network.suspects import Attempt, Doubt, bandwidth_of, confirmed_oddity
from helixbench.reference_server.wire.link_messages import LinkMeasured


def merge(
    pair: Pair, tried: Sequence[LinkMeasured], attempts: Mapping[Pair, Sequence[Attempt]], doubt: Doubt | None
) -> MeasuredLink:
    """The link that all measurements of a pair make; ``doubt`` where there is one still."""
    latencies = [one.latency_s for one in tried if one.latency_s is not None]
    return MeasuredLink(
        src=pair[0],
        dst=pair[1],
        bandwidth_bytes_per_s=bandwidth_of(attempts[pair]),
        latency_s=statistics.median(latencies) if latencies else None,
        source=next((one.source for one in reversed(tried) if one.source), ""),
        spread=tried[-1].spread,
        retransmitted=tried[-1].retransmitted,
        attempts_bytes_per_s=tuple(one.bandwidth_bytes_per_s for one in tried if one.bandwidth_bytes_per_s is not None),
        message_times=next((one.message_times for one in tried if one.message_times), ()),
        suspect=doubt.reason if doubt is not None else "",
        note=confirmed_oddity(pair, attempts) if doubt is None else "",
    )


def attempt_of(measured: LinkMeasured) -> Attempt:
    """A measurement as what is judged."""
    return Attempt(
        bytes_per_s=measured.bandwidth_bytes_per_s,
        spread=measured.spread,
        retransmitted=measured.retransmitted,
        error=measured.error,
    )


def far_end(pair: Pair) -> str:
    """The end that serves iperf3: the one that is not the coordinator, which has no agent to be asked."""
    return pair[0] if pair[1] == COORDINATOR else pair[1]


def client_end(pair: Pair) -> str:
    """Who runs the iperf3 client where pairs are measured at once: the receiver, but the coordinator serves never.

    The client's rates over time are its own: of what came in, not of what its own buffers took.
    """
    return COORDINATOR if COORDINATOR in pair else pair[1]


def server_end(pair: Pair) -> str:
    """The other end than the client's."""
    return pair[0] if pair[1] == client_end(pair) else pair[1]


def card_turns(names: Sequence[str], *, two_at_once: bool) -> list[list[tuple[str, Direction]]]:
    """Which directions of which cards are measured together: one by one, or what a node sends and another receives.

    Two directions of one card would be in each other's way: the acknowledgements of what it receives wait in the queue
    of what it sends.
    """
    if not two_at_once:
        return [[(name, direction)] for name in names for direction in ("out", "in")]
    following = [*names[1:], *names[:1]]
    return [[(name, "out"), (other, "in")] for name, other in zip(names, following, strict=True)]
