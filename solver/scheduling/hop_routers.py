"""Routings that put a pipeline together hop by hop, as others do, to compare with the planned one. Pure.

Each starts at the coordinator and picks the next node among all that hold the next layer and have room, without looking
further. Where that ends at nodes that are full, it goes one hop back. Sources: random and shortest queue as in Helix,
ASPLOS 2025, section 6; swarm after SWARM parallelism (Ryabinin et al., 2023): stochastic wiring by observed throughput.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from helixbench.solver.problem.plan import Hop, LayerRange, Pipeline

OBSERVED_WEIGHT = 0.1  # of the newest observation in a node's moving average


class HopGraph:
    """Which hop can follow which.

    Args:
        placement: node -> layer range.
        num_layers: of the model.
        partial: whether a request may enter a range late.
        is_connected: whether work can go from one node to another; ``None`` for the coordinator.
    """

    def __init__(
        self,
        placement: Mapping[str, LayerRange],
        *,
        num_layers: int,
        partial: bool,
        is_connected: Callable[[str | None, str | None], bool] = lambda _src, _dst: True,
    ) -> None:
        self._placement = dict(sorted(placement.items()))
        self._num_layers, self._partial, self._is_connected = num_layers, partial, is_connected
        self._after: dict[Hop | None, tuple[Hop, ...]] = {}

    def after(self, hop: Hop | None) -> tuple[Hop, ...]:
        """The hops that can follow one; after ``None`` those that a pipeline begins with."""
        known = self._after.get(hop)
        if known is None:
            layer, src = (0, None) if hop is None else (hop.end, hop.node)
            known = self._after[hop] = tuple(
                Hop(node, layer, held.end)
                for node, held in self._placement.items()
                if (held.start == layer or (self._partial and held.start < layer < held.end))
                and self._is_connected(src, node)
                and (held.end < self._num_layers or self._is_connected(node, None))
            )
        return known

    def is_end(self, hop: Hop) -> bool:
        """Whether the model ends there."""
        return hop.end == self._num_layers


class HopRouter(ABC):
    """Chooses hop by hop; how, is the subclass's."""

    def __init__(self, graph: HopGraph) -> None:
        self._graph = graph
        self.pipelines: list[Pipeline] = []
        self._indices: dict[Pipeline, int] = {}  # pipeline -> its index

    @abstractmethod
    def pick(self, hops: Sequence[Hop]) -> Hop:
        """One of these, all of which have room."""

    def began(self, pipeline: Pipeline) -> None:  # noqa: B027 - of interest to some
        """A request takes this pipeline."""

    def ended(self, index: int) -> None:  # noqa: B027
        """A request that took this pipeline has ended."""

    def choose(self, has_room: Callable[[Pipeline], bool]) -> int | None:
        """Index of the pipeline that the next request takes; ``None`` where no path has room from end to end."""
        taken: list[Hop] = []
        dead: set[Hop] = set()  # full, or only full ones behind them
        while True:
            at = taken[-1] if taken else None
            if at is not None and self._graph.is_end(at):
                break
            open_ones = [hop for hop in self._graph.after(at) if hop not in dead and has_room((hop,))]
            if open_ones:
                taken.append(self.pick(open_ones))
            elif at is None:
                return None
            else:
                dead.add(taken.pop())
        index = self._index(tuple(taken))
        self.began(self.pipelines[index])
        return index

    def index_of(self, pipeline: Pipeline) -> int:
        """Its index, with a request on it that comes from another one."""
        self.began(pipeline)
        return self._index(pipeline)

    def _index(self, pipeline: Pipeline) -> int:
        if pipeline not in self._indices:
            self._indices[pipeline] = len(self.pipelines)
            self.pipelines.append(pipeline)
        return self._indices[pipeline]

    def widest(self, capacity: Mapping[str, int]) -> int:
        """The most that some pipeline holds, where each node holds ``capacity``; 0 where there is none at all."""
        for size in sorted(set(capacity.values()), reverse=True):
            if self._reaches_end({node for node, held in capacity.items() if held >= size}):
                return size
        return 0

    def _reaches_end(self, nodes: set[str]) -> bool:
        seen: set[Hop] = set()
        left = [hop for hop in self._graph.after(None) if hop.node in nodes]
        while left:
            hop = left.pop()
            if self._graph.is_end(hop):
                return True
            if hop not in seen:
                seen.add(hop)
                left += [after for after in self._graph.after(hop) if after.node in nodes]
        return False


class RandomRouter(HopRouter):
    """Every next node with equal chance."""

    def __init__(self, graph: HopGraph, rng: random.Random) -> None:
        super().__init__(graph)
        self._rng = rng

    def pick(self, hops: Sequence[Hop]) -> Hop:
        """One of them at random."""
        return self._rng.choice(hops)


class ShortestQueueRouter(HopRouter):
    """The next node with the fewest requests in flight through it, all that a coordinator knows of its queue."""

    def __init__(self, graph: HopGraph) -> None:
        super().__init__(graph)
        self._in_flight: dict[str, int] = {}  # node -> requests that pass it

    def pick(self, hops: Sequence[Hop]) -> Hop:
        """The one with fewest; of equals the first by name."""
        return min(hops, key=lambda hop: (self._in_flight.get(hop.node, 0), hop))

    def began(self, pipeline: Pipeline) -> None:
        """Count it at its nodes."""
        for hop in pipeline:
            self._in_flight[hop.node] = self._in_flight.get(hop.node, 0) + 1

    def ended(self, index: int) -> None:
        """Count it no more."""
        for hop in self.pipelines[index]:
            self._in_flight[hop.node] -= 1


class SwarmRouter(HopRouter):
    """The next node with a chance in proportion to its throughput as observed of late.

    ``observed`` has to be told; a node of which nothing is known yet counts as the mean of those known.
    """

    def __init__(self, graph: HopGraph, rng: random.Random) -> None:
        super().__init__(graph)
        self._rng = rng
        self._tokens_per_s: dict[str, float] = {}  # node -> moving average

    def observed(self, node: str, tokens_per_s: float) -> None:
        """A node ran so many tokens/s while it was busy."""
        before = self._tokens_per_s.get(node, tokens_per_s)
        self._tokens_per_s[node] = before + OBSERVED_WEIGHT * (tokens_per_s - before)

    def pick(self, hops: Sequence[Hop]) -> Hop:
        """One of them, drawn."""
        known = [self._tokens_per_s[hop.node] for hop in hops if hop.node in self._tokens_per_s]
        mean = sum(known) / len(known) if known else 1.0
        weights = [self._tokens_per_s.get(hop.node, mean) for hop in hops]
        return self._rng.choices(hops, weights)[0]
