"""Which measurements of links are doubted, and what measuring them again makes of that. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence

import msgspec

from helixbench.profiler.network.schedule import Pair

MAX_SPREAD = 0.2  # half the interquartile range of the intervals' rates over their median
MAX_RETRANSMITTED = 0.02  # of the segments: TCP that overruns a queue now and then stays below
FAR_BELOW = 0.5  # of the reverse direction, or of the others at both ends
AGREES_WITHIN = 0.1  # of their median: attempts that differ by no more confirm each other


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of a directed pair; ``bytes_per_s`` is ``None`` where it failed, for the reason in ``error``."""

    bytes_per_s: float | None
    spread: float | None = None
    retransmitted: float | None = None
    error: str = ""


class Doubt(msgspec.Struct, frozen=True):
    """Why a pair is measured again. One ``by_comparison`` ends when attempts agree: the link then is like that."""

    reason: str
    by_comparison: bool = False


def bandwidth_of(attempts: Sequence[Attempt]) -> float | None:
    """Median over the attempts that gave a number."""
    rates = [attempt.bytes_per_s for attempt in attempts if attempt.bytes_per_s is not None]
    return statistics.median(rates) if rates else None


def find_doubts(attempts: Mapping[Pair, Sequence[Attempt]]) -> dict[Pair, Doubt]:
    """Pair -> the first reason to doubt it, for those of which there is one.

    A comparison doubts the lower of two numbers: what disturbs a measurement takes bandwidth away.
    """
    rates = {pair: rate for pair, tried in attempts.items() if (rate := bandwidth_of(tried)) is not None}
    doubts: dict[Pair, Doubt] = {}
    for pair, tried in attempts.items():
        doubt = _doubt_alone(tried) or _doubt_beside_others(pair, rates)
        if doubt is not None and not (doubt.by_comparison and _confirmation(pair, attempts)):
            doubts[pair] = doubt
    return doubts


def confirmed_oddity(pair: Pair, attempts: Mapping[Pair, Sequence[Attempt]]) -> str:
    """What a comparison found odd about a pair whose attempts agree; empty where nothing."""
    rates = {other: rate for other, tried in attempts.items() if (rate := bandwidth_of(tried)) is not None}
    doubt = _doubt_beside_others(pair, rates)
    confirmation = _confirmation(pair, attempts)
    return f"{doubt.reason}; {confirmation}" if doubt is not None and confirmation else ""


def _confirmation(pair: Pair, attempts: Mapping[Pair, Sequence[Attempt]]) -> str:
    """What agrees with a pair's bandwidth: a second measurement, or the reverse direction; empty where nothing does."""
    if is_confirmed(attempts[pair]):
        return "a second measurement agrees"
    there, back = bandwidth_of(attempts[pair]), bandwidth_of(attempts.get(pair[::-1], ()))
    if there is not None and back is not None and _agree(there, back):
        return "the reverse direction agrees"
    return ""


def is_confirmed(attempts: Sequence[Attempt]) -> bool:
    """Whether two of the attempts agree: of three, the median then is one of these two."""
    rates = [attempt.bytes_per_s for attempt in attempts if attempt.bytes_per_s is not None]
    return any(_agree(first, second) for first, second in itertools.combinations(rates, 2))


def _agree(first: float, second: float) -> bool:
    return abs(first - second) <= AGREES_WITHIN * (first + second) / 2


def _doubt_alone(attempts: Sequence[Attempt]) -> Doubt | None:
    last = attempts[-1]
    if last.bytes_per_s is None:
        return Doubt(last.error or "no number")
    if last.spread is not None and last.spread > MAX_SPREAD:
        return Doubt(f"rates of its intervals spread by {last.spread:.0%}")
    if last.retransmitted is not None and last.retransmitted > MAX_RETRANSMITTED:
        return Doubt(f"{last.retransmitted:.1%} of its segments were sent again")
    numbers = [attempt for attempt in attempts if attempt.bytes_per_s is not None]
    if len(numbers) > 1 and not is_confirmed(attempts):
        return Doubt(f"{len(numbers)} measurements differ by more than {AGREES_WITHIN:.0%}")
    return None


def _doubt_beside_others(pair: Pair, rates: Mapping[Pair, float]) -> Doubt | None:
    rate = rates.get(pair)
    if rate is None:
        return None
    src, dst = pair
    reverse = rates.get((dst, src))
    if reverse is not None and rate < FAR_BELOW * reverse:
        return Doubt(f"{rate / reverse:.0%} of the reverse direction", by_comparison=True)
    from_src = [other for (a, b), other in rates.items() if a == src and b != dst]
    to_dst = [other for (a, b), other in rates.items() if b == dst and a != src]
    if from_src and to_dst:
        usual = min(statistics.median(from_src), statistics.median(to_dst))
        if rate < FAR_BELOW * usual:
            return Doubt(f"{rate / usual:.0%} of what is usual at both ends", by_comparison=True)
    return None
