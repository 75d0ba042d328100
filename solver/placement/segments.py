"""Segments: the most layers in a row that the nodes of one region hold while they carry a flow, by dynamic programming.

A segment is a row of blocks. A block of ``k`` layers has tracks side by side, each of one or more alike nodes in a row,
whose capacities add up to the flow. The state is how many nodes of each kind are used, so what is found is the longest
row of such blocks. Where a segment is entered from another region, or left for one, each token takes a link of its own
pair of nodes: there the first or the last block is of single nodes side by side, and no node carries more than its
links to the other side.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helixbench.solver.bounds.work import nic_limits
from helixbench.solver.problem.arrays import FloatArray
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange

FAR_SLOWER = 0.5
"""Share of the median node's link rate in its region, or of the target flow if that is less."""

FEWEST = 3
"""Nodes of a region below which none is an outlier."""

MOST_IN_A_ROW = 4
MOST_SIDE_BY_SIDE = 8
"""Nodes that a crossing is planned with on either side."""

SLACK = 1e-9
"""Relative: sums of capacities that fall short by rounding still carry the flow."""

LengthArray = NDArray[np.int16]
Counts = tuple[int, ...]


@dataclass(frozen=True)
class Stock:
    """The nodes that segments are made of, by kind.

    Attributes:
        counts: kind -> number of nodes.
        rates: kind -> tokens/s with 1, 2, ... layers held; 0 where that cannot be.
    """

    counts: dict[int, int]
    rates: dict[int, FloatArray]


def stock_of(capacities: Capacities, names: Sequence[str]) -> Stock:
    """The stock of the nodes named; pinned nodes are not in it.

    Rates are those in the middle of the model, where tokens come in and go out through the node's NIC.
    """
    counts: dict[int, int] = {}
    rates: dict[int, FloatArray] = {}
    for name in names:
        kind = capacities.kind(name)
        if name in capacities.pins:
            continue
        counts[kind] = counts.get(kind, 0) + 1
        if kind not in rates:
            held = [capacities.middle(length) for length in range(1, capacities.max_layers(name) + 1)]
            most = min(nic_limits(capacities, name))
            rates[kind] = np.array(
                [min(capacities.tokens_per_s(name, h), most) if capacities.can_hold(name, h) else 0.0 for h in held]
            )
    return Stock(counts, rates)


def largest_region(capacities: Capacities) -> str:
    """The region with most nodes; of several the one that comes first."""
    return Counter(capacities.regions.values()).most_common(1)[0][0]


def well_linked(capacities: Capacities, flow: float) -> list[str]:
    """The nodes whose links are not far slower than those of their region, in their order.

    Segments are planned as if all links inside a region were alike. A node behind a slow link would be given a share
    that it cannot pass on, so they are planned without such nodes; the searches that follow know each link.

    Args:
        capacities: of the nodes.
        flow: tokens/s; links that carry it are fast enough.
    """
    region = capacities.regions
    links = capacities.profile.links
    if not any(link.src in region and region[link.src] == region.get(link.dst) for link in links):
        return list(region)  # all links inside a region are the default one
    members: dict[str, list[str]] = {}
    for name, place in region.items():
        members.setdefault(place, []).append(name)
    slow: set[str] = set()
    for names in members.values():
        if len(names) >= FEWEST:
            slow |= _far_slower({name: _in_the_middle(capacities, name, names) for name in names}, flow)
    return [name for name in region if name not in slow]


def _far_slower(rates: Mapping[str, float], flow: float) -> set[str]:
    least = FAR_SLOWER * min(flow, statistics.median(rates.values()))
    return {name for name, rate in rates.items() if rate < least}


def _in_the_middle(capacities: Capacities, name: str, names: Sequence[str]) -> float:
    """Tokens/s of the node's links to and from the others in the middle, the slower way of each."""
    links, size = capacities.links, capacities.model.activation_bytes_per_token
    others = [other for other in names if other != name]
    both_ways = [min(links.bandwidth(name, other) or 0.0, links.bandwidth(other, name) or 0.0) for other in others]
    return statistics.median(both_ways) / size


def in_a_row(start: int, num_layers: int, num_nodes: int) -> Iterator[LayerRange]:
    """Ranges of nodes that share this many layers from ``start`` on in parts as equal as possible."""
    share, longer = divmod(num_layers, num_nodes)
    for number in range(num_nodes):
        end = start + share + (number < longer)
        yield LayerRange(start, end)
        start = end


@dataclass(frozen=True)
class Width:
    """Requirement on a block at a crossing: nodes side by side, and the most that each of them can carry."""

    num_nodes: int
    tokens_per_s: float


@dataclass(frozen=True)
class Part:
    """A block of a segment: so many nodes of each kind, ``num_layers`` layers. At a crossing all are side by side."""

    counts: Counts
    num_layers: int
    is_crossing: bool


class Yard:
    """The nodes of one region: what blocks can be made of them, whatever the flow.

    Args:
        counts: kind -> number of nodes.
        rates: kind -> tokens/s with 1, 2, ... layers held.
        fewest: nodes side by side in a block; where more than one has to be, none are in a row.
    """

    def __init__(self, counts: Mapping[int, int], rates: Mapping[int, FloatArray], *, fewest: int = 1) -> None:
        self.kinds = tuple(kind for kind in sorted(counts) if len(rates[kind]) and rates[kind].max() > 0)
        self.counts: Counts = tuple(counts[kind] for kind in self.kinds)
        self._shape = tuple(count + 1 for count in self.counts)
        self._longest = max((len(rates[kind]) for kind in self.kinds), default=0)
        self._rates = [np.pad(rates[kind], (0, self._longest - len(rates[kind]))) for kind in self.kinds]
        self._fewest, self._in_a_row = fewest, MOST_IN_A_ROW if fewest == 1 else 1
        self._rows = [
            _in_rows(rate, count, most=self._in_a_row) for rate, count in zip(self._rates, self.counts, strict=True)
        ]
        self._alone = [np.outer(rate, np.arange(n + 1)) for rate, n in zip(self._rates, self.counts, strict=True)]

    def lengths(self, flow: float) -> LengthArray:
        """Layers of the longest block of exactly so many nodes of each kind that carries the flow; 0 for none."""
        lengths = self._count_lengths(self._rows, flow)
        return np.minimum(lengths, self._side_by_side(self._fewest)) if self._fewest > 1 else lengths

    def lengths_at(self, width: Width, flow: float) -> LengthArray:
        """The same of nodes side by side at a crossing."""
        kinds = list(zip(self._rates, self.counts, strict=True))
        limited = [np.outer(np.minimum(rate, width.tokens_per_s), np.arange(n + 1)) for rate, n in kinds]
        return np.minimum(self._count_lengths(limited, flow), self._side_by_side(max(width.num_nodes, self._fewest)))

    def _side_by_side(self, least: int) -> LengthArray:
        """Layers that at least so many of exactly so many nodes of each kind can each hold."""
        kinds = zip(self._rates, self.counts, strict=True)
        return self._count_lengths([np.outer(rate > 0, np.arange(n + 1)) for rate, n in kinds], least)

    def _count_lengths(self, values: Sequence[NDArray[np.floating] | NDArray[np.integer]], least: float) -> LengthArray:
        """For each state the number of lengths, from 1 on, for which the kinds' values add up to at least so much."""
        lengths = np.zeros(self._shape, dtype=np.int16)
        for length in range(self._longest):
            total = np.zeros(self._shape)
            for axis, of_kind in enumerate(values):
                total += of_kind[length].reshape([-1 if other == axis else 1 for other in range(len(values))])
            reached = total >= least * (1 - SLACK)
            if not reached.any():
                break
            lengths += reached  # capacities fall with the length, so no length is left out below
        return lengths

    def carries(self, part: Part) -> float:
        """Tokens/s of a block, links aside."""
        values = self._alone if part.is_crossing else self._rows
        return float(sum(of[part.num_layers - 1, n] for of, n in zip(values, part.counts, strict=True)))

    def tracks(self, part: Part, number: int) -> list[int]:
        """How many nodes each track of a block has of its kind number ``number``."""
        count, num_layers = part.counts[number], part.num_layers
        if part.is_crossing:
            return [1] * count
        rate, best = self._rates[number], self._rows[number][num_layers - 1]
        rows = []
        while count > 0:
            for n in range(1, min(self._in_a_row, count, num_layers) + 1):
                if best[count] <= best[count - n] + rate[-(-num_layers // n) - 1] * (1 + SLACK):
                    rows.append(n)
                    count -= n
                    break
            else:
                count -= 1  # one that adds nothing
        return rows


def _in_rows(rate: FloatArray, count: int, *, most: int) -> FloatArray:
    """``[length - 1, n]``: the most that ``n`` nodes carry as tracks of so many layers, some in a row."""
    best = np.zeros((len(rate), count + 1))
    for length in range(1, len(rate) + 1):
        for n in range(1, count + 1):
            rows = range(1, min(most, n, length) + 1)
            best[length - 1, n] = max(
                best[length - 1, n - 1], *(best[length - 1, n - m] + rate[-(-length // m) - 1] for m in rows)
            )
    return best


class Segments:
    """The longest segments of one region at one flow, for every width at either end. What is asked for is kept."""

    def __init__(self, yard: Yard, flow: float) -> None:
        self._yard, self._flow = yard, flow
        self._lengths = yard.lengths(flow)
        self._best = np.zeros(self._lengths.shape, dtype=np.int16)  # state -> most layers of blocks of those nodes
        self._blocks: list[tuple[Counts, int]] = []
        for counts, length in _minimal(self._lengths):
            if self._best[counts] < length:  # else smaller blocks of the same nodes hold as many
                self._blocks.append((counts, length))
                for _ in range(min(n // c for n, c in zip(yard.counts, counts, strict=True) if c)):
                    _put_in(self._best, self._best, counts, length)
        self._at: dict[Width, LengthArray] = {}
        self._entered: dict[Width | None, LengthArray] = {None: self._best}

    def longest(self, entry: Width | None, leave: Width | None) -> int:
        """Layers of the longest segment with such ends, ``None`` where the model ends; 0 where there is none."""
        entered = self._entered_by(entry)
        if leave is None:
            return int(entered.flat[-1])
        left = np.flip(entered)  # what the nodes hold that are not in the last block
        last = self._lengths_at(leave)
        apart = np.where((last > 0) & (left > 0), left + last, 0) if entry else np.where(last > 0, left + last, 0)
        found = int(apart.max(initial=0))
        if entry is not None:
            found = max(found, int(np.minimum(last, self._lengths_at(entry)).max(initial=0)))
        return found

    def parts(self, entry: Width | None, leave: Width | None) -> list[Part]:
        """The blocks of the longest segment in their order; one block may be all of it."""
        total = self.longest(entry, leave)
        state = self._yard.counts
        last: list[Part] = []
        if leave is not None and total:
            left, at = np.flip(self._entered_by(entry)), self._lengths_at(leave)
            apart = np.where((at > 0) & ((left > 0) if entry else True), left + at, 0)
            if apart.max(initial=0) < total:
                assert entry is not None
                alone = np.minimum(at, self._lengths_at(entry))
                counts = _where_largest(alone)
                return [Part(counts, int(alone[counts]), is_crossing=True)]
            counts = _where_largest(apart)
            last = [Part(counts, int(at[counts]), is_crossing=True)]
            state = _minus(state, counts)
        first: list[Part] = []
        if entry is not None and total:
            entered, at = self._entered_by(entry), self._lengths_at(entry)
            for counts, length in _minimal(at):
                rest = _minus(state, counts)
                if min(rest, default=0) >= 0 and entered[state] == self._best[rest] + length:
                    first, state = [Part(counts, length, is_crossing=True)], rest
                    break
        return [*first, *self._middle(state), *last]

    def _middle(self, state: Counts) -> Iterator[Part]:
        while self._best[state] > 0:
            for counts, length in self._blocks:
                rest = _minus(state, counts)
                if min(rest) >= 0 and self._best[state] == self._best[rest] + length:
                    yield Part(counts, length, is_crossing=False)
                    state = rest
                    break

    def _lengths_at(self, width: Width) -> LengthArray:
        if width not in self._at:
            self._at[width] = self._yard.lengths_at(width, self._flow)
        return self._at[width]

    def _entered_by(self, entry: Width | None) -> LengthArray:
        """State -> most layers, the first block of that width included; 0 where there is no such block."""
        if entry not in self._entered:
            assert entry is not None
            found = np.zeros_like(self._best)
            for counts, length in _minimal(self._lengths_at(entry)):
                _put_in(found, self._best, counts, length)
            self._entered[entry] = found
        return self._entered[entry]


def _put_in(best: LengthArray, rest: LengthArray, counts: Counts, length: int) -> None:
    """Make ``best`` at least what a block and the rest of the nodes hold."""
    above = tuple(slice(c, None) for c in counts)
    below = tuple(slice(0, n - c) for n, c in zip(rest.shape, counts, strict=True))
    best[above] = np.maximum(best[above], rest[below] + length)


def _minimal(lengths: LengthArray) -> list[tuple[Counts, int]]:
    """The blocks that would be shorter without any one of their nodes, those of fewest nodes first."""
    is_minimal = lengths > 0
    for axis in range(lengths.ndim):
        fewer = np.zeros_like(lengths)
        above = tuple(slice(1, None) if other == axis else slice(None) for other in range(lengths.ndim))
        below = tuple(slice(0, -1) if other == axis else slice(None) for other in range(lengths.ndim))
        fewer[above] = lengths[below]
        is_minimal &= fewer < lengths
    found = [tuple(int(i) for i in counts) for counts in np.argwhere(is_minimal)]
    return [(counts, int(lengths[counts])) for counts in sorted(found, key=lambda counts: (sum(counts), counts))]


def _where_largest(lengths: LengthArray) -> Counts:
    return tuple(int(i) for i in np.unravel_index(int(lengths.argmax()), lengths.shape))


def _minus(one: Counts, other: Counts) -> Counts:
    return tuple(a - b for a, b in zip(one, other, strict=True))
