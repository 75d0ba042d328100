"""Placements for clusters of several regions: each region by itself, or some in a row across the slow links.

A row of regions is a chain of segments, one in each, that widens at each crossing: a few nodes side by side on both
sides make one slow link into many. Which order, which widths and how many layers in each is found by dynamic
programming over the segments' lengths. Then the best way to part the regions into rows is taken.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from helixbench.solver.bounds.work import work_bound
from helixbench.solver.placement.segments import (
    MOST_SIDE_BY_SIDE,
    Part,
    Segments,
    Width,
    Yard,
    in_a_row,
    stock_of,
    well_linked,
)
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Placement

Regions = frozenset[str]
Names = dict[int, list[str]]  # kind -> nodes
Yards = list[tuple[Yard, Names]]

STEP = 1.002
"""Ratio of one flow that is tried to the next."""

LOWEST = 0.01
"""Share of the bound: the least flow that is tried."""

MOST_PARTED = 4
"""Regions of which every set is planned; with more, sets grow from single ones, the best pair joined each time."""

STATES = (20_000, 1_000_000)
"""Combinations of numbers of nodes of each kind, over all regions, in a first plan and in a second one.

A region with more than its share is split into yards with fewer.
"""

LINK_SHARES = (1.0, 0.93)
"""Shares of the mean link between two regions to plan with: the few at a crossing may be slower than the mean."""

MOST_KEPT = 40
"""Beam width: of the beginnings of rows with the same number of regions, the longest so many are continued."""


@dataclass(frozen=True)
class _Leg:
    """A region in a row, and the width at which it is entered and left; ``None`` where the model begins or ends."""

    region: str
    entry: Width | None
    leave: Width | None


Row = tuple[_Leg, ...]


def regional_placements(capacities: Capacities, *, bound: float, may_go_on: Callable[[], bool]) -> Iterator[Placement]:
    """Placements of sets of regions as they are planned, then of the best way to part the regions.

    Args:
        capacities: of the nodes and their regions.
        bound: no placement carries more.
        may_go_on: asked before each flow that is tried.
    """
    regions: dict[str, list[str]] = {}  # region -> its nodes
    for name in well_linked(capacities, bound):
        if name not in capacities.pins:
            regions.setdefault(capacities.regions[name], []).append(name)

    @functools.cache  # slow, and the same for every planner
    def work_of(chosen: Regions) -> float:
        names = [name for region in sorted(chosen) for name in regions[region]]
        return work_bound(capacities, names=names)

    rates = _link_rates(capacities, regions)
    num_yards: list[int] = []
    for states in STATES:
        yards = {region: _yards(capacities, names, states // len(regions)) for region, names in sorted(regions.items())}
        if [len(of) for of in yards.values()] == num_yards:
            break  # more states would plan the same
        num_yards = [len(of) for of in yards.values()]
        for share in LINK_SHARES if len(regions) > 1 else (1.0,):
            shared = {between: share * rate for between, rate in rates.items()}
            yield from _planned(_Planner(capacities, bound, yards, shared, work_of, may_go_on))


def _link_rates(capacities: Capacities, regions: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], float]:
    """(region, region) -> tokens/s of a link between them: the mean, for links at a crossing add up."""
    size = capacities.model.activation_bytes_per_token
    found = {}
    for src, dst in itertools.permutations(sorted(regions), 2):
        rates = [capacities.links.bandwidth(a, b) or 0.0 for a in regions[src] for b in regions[dst]]
        found[src, dst] = sum(rates) / len(rates) / size
    return found


def _planned(planner: _Planner) -> Iterator[Placement]:
    planned: dict[Regions, float] = {}
    few = len(planner.regions) <= MOST_PARTED
    for chosen in planner.every_set() if few else planner.growing_sets():
        flow = planner.largest_flow(chosen)
        if flow > 0:
            planned[chosen] = flow
            yield planner.placement(chosen, flow)
    parting = best_parting(frozenset(planner.regions), planned)
    merged: Placement = {}
    for chosen in parting:
        merged |= planner.placement(chosen, planned[chosen])
    if len(parting) > 1:
        yield merged


def best_parting(regions: Regions, planned: dict[Regions, float]) -> tuple[Regions, ...]:
    """Sets that have no region in common and carry most in all; larger sets are taken before smaller ones."""
    useful = sorted((s for s in planned if s <= regions), key=lambda s: (-planned[s] / len(s), sorted(s)))
    best: tuple[float, tuple[Regions, ...]] = (0.0, ())

    def go_on(at: int, carried: float, chosen: tuple[Regions, ...], left: Regions) -> None:
        nonlocal best
        if carried > best[0]:
            best = (carried, chosen)
        for number in range(at, len(useful)):
            most_each = planned[useful[number]] / len(useful[number])
            if carried + most_each * len(left) <= best[0]:
                return  # branch and bound: no set behind this one carries more for each region
            if useful[number] <= left:
                carries = planned[useful[number]]
                go_on(number + 1, carried + carries, (*chosen, useful[number]), left - useful[number])

    go_on(0, 0.0, (), regions)
    return best[1]


class _Planner:
    """Rows of regions at every flow asked for, with all that was found on the way."""

    def __init__(
        self,
        capacities: Capacities,
        bound: float,
        yards: Mapping[str, Yards],
        rates: Mapping[tuple[str, str], float],
        work_of: Callable[[Regions], float],
        may_go_on: Callable[[], bool],
    ) -> None:
        self._capacities, self._bound, self._may_go_on = capacities, bound, may_go_on
        self._yards, self._rates, self._work_of = yards, rates, work_of
        self.regions = sorted(yards)
        self._segments: dict[tuple[str, float], list[Segments]] = {}
        self._rows: dict[tuple[Regions, float], Row | None] = {}
        self._flows: dict[Regions, float] = {}

    def every_set(self) -> Iterator[Regions]:
        """Every set of regions, all together first: what they carry limits the rest."""
        for size in (len(self.regions), *range(1, len(self.regions))):
            yield from map(frozenset, itertools.combinations(self.regions, size))

    def growing_sets(self) -> Iterator[Regions]:
        """Single regions, then again and again the two sets that gain most by being joined."""
        groups = [frozenset([region]) for region in self.regions]
        yield from groups
        tried: set[Regions] = set()
        while len(groups) > 1:
            pairs = list(itertools.combinations(groups, 2))
            for one, other in pairs:
                if one | other not in tried:
                    tried.add(one | other)
                    yield one | other
            gain, one, other = max(
                ((self.largest_flow(a | b) - self.largest_flow(a) - self.largest_flow(b), a, b) for a, b in pairs),
                key=lambda item: item[0],
            )
            if gain < 0 and self.largest_flow(one) > 0 < self.largest_flow(other):
                return
            groups = [group for group in groups if group not in (one, other)] + [one | other]

    def largest_flow(self, chosen: Regions) -> float:
        """The largest flow that a row of some of these regions carries, on a grid of ratio ``STEP``; 0 where none does.

        What carries a flow carries less, so it is found by bisection: closer to the upper end, for a try at a flow that
        is out of reach ends sooner.
        """
        if chosen in self._flows:
            return self._flows[chosen]
        bounds = [self._bound, self._work_of(chosen)]
        bounds += [flow for other, flow in self._flows.items() if chosen < other]
        high = math.floor(math.log(min(bounds) / self._bound / LOWEST) / math.log(STEP)) + 1 if min(bounds) > 0 else 0
        low = 0  # the step below the lowest flow
        while high - low > 1 and self._may_go_on():
            step = (low + high + 1) // 2 if high - low < 8 else low + (3 * (high - low)) // 4
            if self._row(chosen, self._flow_at(step)) is None:
                high = step
            else:
                low = step
        self._flows[chosen] = self._flow_at(low) if low else 0.0
        return self._flows[chosen]

    def _flow_at(self, step: int) -> float:
        return self._bound * LOWEST * STEP**step

    def _row(self, chosen: Regions, flow: float) -> Row | None:
        """A row of the regions whose segments hold all layers at that flow, or ``None``."""
        if (chosen, flow) not in self._rows:
            self._rows[chosen, flow] = self._find_row(chosen, flow)
        return self._rows[chosen, flow]

    def _find_row(self, chosen: Regions, flow: float) -> Row | None:
        """Beam search, region by region; of rows that passed the same regions and enter alike the longest is kept."""
        num_layers = self._capacities.model.num_layers
        # (layers so far, legs, region that is entered now, at what width)
        begun: list[tuple[int, Row, str, Width | None]] = [(0, (), region, None) for region in sorted(chosen)]
        while begun:
            further: dict[tuple[Regions, str, Width], tuple[int, Row, str, Width | None]] = {}
            for held, legs, region, entry in begun:
                if held + self._longest(region, flow, entry, None) >= num_layers:
                    return (*legs, _Leg(region, entry, None))
                passed = frozenset([region, *(leg.region for leg in legs)])
                for following in sorted(chosen - passed):
                    for leave, into in widths(flow, self._rates[region, following]):
                        layers = self._longest(region, flow, entry, leave)
                        key = (passed, following, into)
                        if layers and (key not in further or further[key][0] < held + layers):
                            further[key] = (held + layers, (*legs, _Leg(region, entry, leave)), following, into)
            begun = sorted(further.values(), key=lambda item: -item[0])[:MOST_KEPT]
        return None

    def _segments_of(self, region: str, flow: float) -> list[Segments]:
        if (region, flow) not in self._segments:
            self._segments[region, flow] = [Segments(yard, flow) for yard, _ in self._yards[region]]
        return self._segments[region, flow]

    def _longest(self, region: str, flow: float, entry: Width | None, leave: Width | None) -> int:
        """Layers of the longest segment of a region; its yards come one after another."""
        segments = self._segments_of(region, flow)
        found = 0
        for first, last, segment in _ends(segments):
            layers = segment.longest(entry if first else None, leave if last else None)
            if not layers and ((first and entry) or (last and leave)):
                return 0
            found += layers
        return found

    def placement(self, chosen: Regions, flow: float) -> Placement:
        """The row of these regions at that flow. Where it holds layers too many, the scarcest blocks have fewer."""
        row = self._row(chosen, flow)
        assert row is not None
        parts: list[tuple[Yard, Names, Part]] = []
        for leg in row:
            segments = self._segments_of(leg.region, flow)
            for (first, last, segment), (yard, names) in zip(_ends(segments), self._yards[leg.region], strict=True):
                left = {kind: list(of_kind) for kind, of_kind in names.items()}
                found = segment.parts(leg.entry if first else None, leg.leave if last else None)
                parts += [(yard, left, part) for part in found]
        for _ in range(sum(part.num_layers for *_, part in parts) - self._capacities.model.num_layers):
            number = min(range(len(parts)), key=lambda i: parts[i][0].carries(parts[i][2]))
            yard, left, part = parts[number]
            if part.num_layers > 1:
                parts[number] = (yard, left, Part(part.counts, part.num_layers - 1, part.is_crossing))
            else:
                del parts[number]
        return self._lay_out(parts)

    def _lay_out(self, parts: Sequence[tuple[Yard, Names, Part]]) -> Placement:
        placement: Placement = {}
        reached = 0
        for yard, left, part in parts:
            for number, kind in enumerate(yard.kinds):
                for num_nodes in yard.tracks(part, number):
                    for held in in_a_row(reached, part.num_layers, num_nodes):
                        placement[left[kind].pop(0)] = held
            reached += part.num_layers
        return {name: held for name, held in placement.items() if self._capacities.can_hold(name, held)}


def _ends(segments: Sequence[Segments]) -> Iterator[tuple[bool, bool, Segments]]:
    """(is the first, is the last, segment) of each yard of a region in turn."""
    for number, segment in enumerate(segments):
        yield number == 0, number == len(segments) - 1, segment


def _yards(capacities: Capacities, names: Sequence[str], most: int) -> Yards:
    """A region's nodes as one yard, or dealt out to several with at most so many states in all."""
    stock = stock_of(capacities, names)
    by_kind: dict[int, list[str]] = {}
    for name in names:
        by_kind.setdefault(capacities.kind(name), []).append(name)

    def states(num_yards: int) -> int:
        return num_yards * math.prod(-(-count // num_yards) + 1 for count in stock.counts.values())

    num_yards = next((number for number in range(1, len(names)) if states(number) <= most), max(1, len(names)))
    found = []
    for number in range(num_yards):
        dealt = {kind: of_kind[number::num_yards] for kind, of_kind in sorted(by_kind.items())}
        counts = {kind: len(of_kind) for kind, of_kind in dealt.items()}
        yard = Yard(counts, stock.rates, fewest=1 + capacities.survive)
        if yard.kinds:
            found.append((yard, dealt))
    return found


def widths(flow: float, link_tokens_per_s: float) -> list[tuple[Width, Width]]:
    """(width on the side that sends, on the side that receives) of crossings whose links carry the flow."""
    if link_tokens_per_s <= 0:
        return []
    found: list[tuple[Width, Width]] = []
    narrowest = MOST_SIDE_BY_SIDE + 1
    for senders in range(1, MOST_SIDE_BY_SIDE + 1):
        receivers = math.ceil(flow / (senders * link_tokens_per_s) * (1 - 1e-9))
        if receivers < narrowest:
            narrowest = receivers
            found.append((Width(senders, receivers * link_tokens_per_s), Width(receivers, senders * link_tokens_per_s)))
    return found
