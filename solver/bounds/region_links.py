"""An upper bound on the max-flow from what can pass between regions.

Let ``f_G(v)`` be the tokens/s that nodes of a group of regions ``G`` run at layer ``v``. Every token is run once at
each layer, so over groups that part the nodes ``sum f_G(v) = F`` at every layer. From one layer to the next ``f_G``
changes only by what comes in from nodes outside ``G`` and what goes out to them, and over all layers together that is
at most what the links and NICs carry in and out, for each link has one capacity for all layers. So ``f_G(v)``
is never above its least value ``b_G`` by more than ``d_G``, the larger of the two.

The nodes of ``G`` run ``b_G`` at every layer, so ``b_G`` is at most any bound on what they carry by themselves, links
aside (``configurations``; a node that runs more than ``b_G`` at a layer counts for ``b_G``), and at most what the
coordinator's links carry to ``G`` and back. At the layer where one group has its least, the sum is

    F <= sum over groups of b_G + sum over the other groups of d_G.

It is tight where links between regions carry little beside the nodes; where they could carry all, it is no bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.bounds.configurations import Configurations
from helixbench.solver.bounds.work import best_rates, nic_limits, work_bound
from helixbench.solver.problem.capacity import Capacities

MOST_REGIONS = 4
"""Up to so many regions, all partitions are tried; with more, each by itself, and each against the rest."""

Group = frozenset[str]


class RegionBound:
    """The bound by the links between groups of a cluster's regions."""

    def __init__(self, capacities: Capacities) -> None:
        self._capacities = capacities
        self._region = capacities.regions
        self.regions = sorted(set(self._region.values()))
        self._most = {name: _most(capacities, name) for name in capacities.nodes}
        self._nics = {name: nic_limits(capacities, name) for name in capacities.nodes}
        self._alone: dict[Group, float] = {}
        self._add_up_links()

    def bound(self, *, high: float, may_go_on: Callable[[], bool] = lambda: True) -> float:
        """The least bound of all ways to part the regions, or ``high``.

        Args:
            high: a bound that holds already.
            may_go_on: asked before each way to part them.
        """
        for parts in _partings(self.regions):
            if not may_go_on():
                break
            changes = sorted(self.change(group) for group in parts)
            between = sum(changes[:-1])
            if between < high:
                high = min(high, between + sum(self._always(group, high, may_go_on) for group in parts))
        return high

    def change(self, group: Group) -> float:
        """``d_G``: by how much what the group runs at two layers can differ, tokens/s."""
        inside = [name for name, region in self._region.items() if region in group]
        outside = [name for name, region in self._region.items() if region not in group]
        others = frozenset(self.regions) - group
        return max(self._carried(outside, others, inside, group), self._carried(inside, group, outside, others))

    def _carried(self, sources: Collection[str], here: Group, targets: Collection[str], there: Group) -> float:
        """Most tokens/s over all links from the nodes of some regions to those of others."""
        sent = (min(sum(self._sent[name, region] for region in there), self._limit(name, way=0)) for name in sources)
        received = (
            min(sum(self._received[name, region] for region in here), self._limit(name, way=1)) for name in targets
        )
        return min(sum(sent), sum(received))

    def _limit(self, name: str, *, way: int) -> float:
        """Tokens/s that a node can run and its NIC can send (``way`` 0) or receive (1)."""
        return min(self._most[name], self._nics[name][way])

    def _add_up_links(self) -> None:
        """(node, region) -> tokens/s over all its links to the region, and from there."""
        size = self._capacities.model.activation_bytes_per_token
        self._sent = {(name, region): 0.0 for name in self._region for region in self.regions}
        self._received = dict(self._sent)
        for src, dst in itertools.permutations(self._region, 2):
            if self._region[src] != self._region[dst]:
                rate = min((self._capacities.links.bandwidth(src, dst) or 0.0) / size, self._most[src], self._most[dst])
                self._sent[src, self._region[dst]] += rate
                self._received[dst, self._region[src]] += rate

    def _always(self, group: Group, high: float, may_go_on: Callable[[], bool]) -> float:
        """A bound on ``b_G``: what the group runs at every layer."""
        if group not in self._alone:
            names = [name for name, region in self._region.items() if region in group]
            size = self._capacities.model.token_bytes
            reached = sum((self._capacities.links.bandwidth(COORDINATOR, name) or 0.0) / size for name in names)
            left = sum((self._capacities.links.bandwidth(name, COORDINATOR) or 0.0) / size for name in names)
            most = min(high, reached, left, work_bound(self._capacities, names=names))
            configurations = Configurations(self._capacities, names=names)
            self._alone[group] = configurations.bound(low=0.0, high=most, may_go_on=may_go_on) if most else 0.0
        return self._alone[group]


def _most(capacities: Capacities, name: str) -> float:
    """The most tokens/s of a node, whatever it holds and wherever it is entered."""
    if capacities.mixes_entries(name):
        return float("inf")  # entered late it runs few layers of what it holds: not worth the look
    return max(best_rates(capacities, name), default=0.0)


def _partings(regions: list[str]) -> Iterator[tuple[Group, ...]]:
    """Ways to part the regions into two groups or more."""
    if len(regions) <= MOST_REGIONS:
        yield from (parts for parts in _all_partings(regions) if len(parts) > 1)
        return
    yield tuple(frozenset([region]) for region in regions)
    for region in regions:
        yield frozenset([region]), frozenset(regions) - {region}


def _all_partings(regions: list[str]) -> Iterator[tuple[Group, ...]]:
    if not regions:
        yield ()
        return
    first, *rest = regions
    for parts in _all_partings(rest):
        yield (frozenset([first]), *parts)
        for number, group in enumerate(parts):
            yield (*parts[:number], group | {first}, *parts[number + 1 :])
