"""Placements for clusters of several regions: each region by itself, or some in a row across the slow links.

A row splits the layers among its regions by what their nodes can do, and widens at each crossing: a few nodes side by
side make one slow link into several. Every set of regions is planned once; then the best way to part the regions into
sets is taken.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import msgspec

from . import milp
from .bounds import work_bound
from .capacity import Capacities
from .chains import widest_chain
from .configurations import Configurations
from .network import LinkTable
from .plan import LayerRange

Placement = dict[str, LayerRange]

NEARLY = 0.98
"""Of a set's own bound: a chain that carries so much is not worth a program."""

MOST_CONFIGURED = 60
"""Nodes of a set up to which single layers bound its flow well below its nodes' work."""

MOST_PARTED = 4
"""Regions of which every set is planned; with more, only single ones and all in a row."""


def regional_placements(capacities: Capacities, limits: milp.Limits) -> Iterator[Placement]:
    """Placements of the sets of regions as they are planned, then of the best way to part the regions.

    Args:
        capacities: of the nodes; a node's ``region`` says where it is.
        limits: the time is for all sets together.
    """
    regions = sorted({node.region for node in capacities.profile.nodes})
    sizes = range(1, len(regions) + 1) if len(regions) <= MOST_PARTED else (1, len(regions))
    sets = [chosen for size in sizes for chosen in itertools.combinations(regions, size)]
    began = time.perf_counter()
    table = LinkTable(capacities.profile)  # a million links in the largest clusters: once for all sets
    planned: dict[tuple[str, ...], tuple[float, Placement]] = {}
    for number, chosen in enumerate(sets):
        left = limits.time_s - (time.perf_counter() - began)
        if left <= 0:
            break
        slice_s = left / (len(sets) - number)
        outcome = _plan_set(capacities, table, chosen, _for_seconds(limits, slice_s))
        if outcome is not None:
            planned[chosen] = outcome
            yield outcome[1]
    best = max(_partings(regions, planned), key=lambda sets: sum(planned[chosen][0] for chosen in sets), default=[])
    merged: Placement = {}
    for chosen in best:
        merged |= planned[chosen][1]
    if merged:
        yield merged


def _for_seconds(limits: milp.Limits, seconds: float) -> milp.Limits:
    """The same limits for so many seconds."""
    return milp.Limits(time_s=seconds, threads=limits.threads, seed=limits.seed, relative_gap=limits.relative_gap)


def _partings(
    regions: Sequence[str], planned: dict[tuple[str, ...], tuple[float, Placement]]
) -> Iterator[list[tuple[str, ...]]]:
    """Every way to part some of the regions into planned sets."""
    if not regions:
        yield []
        return
    first, rest = regions[0], regions[1:]
    yield from _partings(rest, planned)  # the first is left out
    for chosen in planned:
        if first in chosen and all(region == first or region in rest for region in chosen):
            others = [region for region in rest if region not in chosen]
            for parting in _partings(others, planned):
                yield [chosen, *parting]


def _plan_set(
    capacities: Capacities, table: LinkTable, regions: tuple[str, ...], limits: milp.Limits
) -> tuple[float, Placement] | None:
    """Largest flow through the regions in a row, and its placement; ``None`` where the time brought none."""
    profile = capacities.profile
    nodes = tuple(node for node in profile.nodes if node.region in regions)
    mine = Capacities(
        msgspec.structs.replace(profile, nodes=nodes, links=()), capacities.workload, concurrency=capacities.concurrency
    )
    names = [node.name for node in nodes]
    if sum(mine.max_layers(name) for name in names) < mine.model.num_layers:
        return None
    deadline = time.perf_counter() + limits.time_s / 4
    clip = work_bound(mine, partial=False)
    if len(names) <= MOST_CONFIGURED:
        clip = Configurations(mine, partial=False).bound(
            low=0.0, high=clip, may_go_on=lambda: time.perf_counter() < deadline
        )
    windows = _windows(mine, regions, clip)
    if windows is None:
        return None
    crossings = _crossings(capacities, table, regions, windows)
    chain = widest_chain(
        mine,
        regions,
        bound=clip,
        link_tokens_per_s=[crossing.tokens_per_s for crossing in crossings],
        seconds=limits.time_s * (0.5 if len(regions) > 1 else 0.7),
    )
    if chain is not None and chain[0] >= NEARLY * clip:
        return chain
    model = milp.pooled_model(mine, names, partial=False, clip=clip, windows=windows, crossings=crossings)
    outcome = milp.solve(model, _for_seconds(limits, limits.time_s / 2), hint=chain[1] if chain else None)
    if outcome.placement and (chain is None or outcome.value > chain[0]):
        return outcome.value, outcome.placement
    return chain


def _windows(capacities: Capacities, regions: tuple[str, ...], flow: float) -> dict[str, LayerRange] | None:
    """Layers of each region in turn, in proportion to the work that its nodes can do at that flow."""
    num_layers = capacities.model.num_layers
    work = dict.fromkeys(regions, 0.0)
    most = dict.fromkeys(regions, 0)
    for name, node in capacities.nodes.items():
        longest = capacities.max_layers(name)
        most[node.region] += longest
        starts = [(k, 1 if k < num_layers else 0) for k in range(1, longest + 1)]
        work[node.region] += max(
            (
                k * min(flow, capacities.tokens_per_s(name, LayerRange(s, s + k)))
                for k, s in starts
                if s + k <= num_layers
            ),
            default=0.0,
        )
    if sum(work.values()) <= 0:
        return None
    windows: dict[str, LayerRange] = {}
    reached, done = 0, 0.0
    for region in regions:
        done += work[region]
        end = min(num_layers if region == regions[-1] else round(num_layers * done / sum(work.values())), num_layers)
        end = min(end, reached + most[region])
        if end <= reached:
            return None
        windows[region] = LayerRange(reached, end)
        reached = end
    return windows if reached == num_layers else None


def _crossings(
    capacities: Capacities, table: LinkTable, regions: tuple[str, ...], windows: dict[str, LayerRange]
) -> list[milp.Crossing]:
    by_region: dict[str, list[str]] = {}
    for name, node in capacities.nodes.items():
        by_region.setdefault(node.region, []).append(name)
    found = []
    for src, dst in itertools.pairwise(regions):
        rates = [
            (table.bandwidth(a, b) or 0.0) / capacities.model.activation_bytes_per_token
            for a in by_region[src]
            for b in by_region[dst]
        ]
        # The mean: which nodes stand at the crossing is not known yet, and links there add up.
        found.append(milp.Crossing(windows[src].end, src, dst, sum(rates) / len(rates)))
    return found
