"""Times of messages over their sizes, held against ``latency + bytes / bandwidth``. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from helixbench.profiler.cluster import Link, MessageTime

OFF_BY = 0.25  # relative; what is less is in the noise of a busy machine


class Miss(msgspec.Struct, frozen=True):
    """A message size at which the linear model is off: ``ratio`` is measured over modelled seconds."""

    src: str
    dst: str
    message_bytes: int
    one_way_s: float
    ratio: float


def model_s(latency_s: float, bandwidth_bytes_per_s: float, message_bytes: int) -> float:
    """Seconds that the linear model gives a message."""
    return latency_s + message_bytes / bandwidth_bytes_per_s


def ratios(link: Link) -> tuple[tuple[int, float], ...]:
    """(message bytes, measured over modelled seconds) of a link's curve."""
    return tuple(
        (
            time.message_bytes,
            time.one_way_s / model_s(link.latency_s, link.bandwidth_bytes_per_s, time.message_bytes),
        )
        for time in link.message_times
    )


def misses(links: Iterable[Link]) -> list[Miss]:
    """Where the model is off by more than ``OFF_BY``: the worst size of each such link, the worst link first."""
    worst = []
    for link in links:
        off = [
            Miss(link.src, link.dst, time.message_bytes, time.one_way_s, ratio)
            for time, (_, ratio) in zip(link.message_times, ratios(link), strict=True)
            if not 1 / (1 + OFF_BY) <= ratio <= 1 + OFF_BY
        ]
        if off:
            worst.append(max(off, key=_distance))
    return sorted(worst, key=_distance, reverse=True)


def bytes_per_s(times: Sequence[MessageTime]) -> float | None:
    """What the largest message gives: a rough idea of the bandwidth, before it is measured."""
    if not times:
        return None
    largest = max(times, key=lambda time: time.message_bytes)
    return largest.message_bytes / largest.one_way_s


def _distance(miss: Miss) -> float:
    return max(miss.ratio, 1 / miss.ratio)
