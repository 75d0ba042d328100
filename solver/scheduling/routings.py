"""Routings by name: the planned one, and those of other systems that put a pipeline together hop by hop. Pure.

Hop by hop, the coordinator picks the next node among all that hold the next layer and have room, without looking
further; where that ends at nodes that are full, it goes one hop back. Sources: random and shortest queue as in Helix,
ASPLOS 2025, section 6; swarm after SWARM parallelism (Ryabinin et al., 2023): stochastic wiring by observed throughput.
"""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from helixbench.solver.flow.pipelines import pipelines
from helixbench.solver.problem.plan import Hop, LayerRange, Pipeline, Plan
from helixbench.solver.scheduling.router import AdaptiveRouter, Chooser, Router, weighted_pipelines
from helixbench.solver.scheduling.work import Routing

OBSERVED_WEIGHT = 0.1
"""Weight of the newest observation in a node's moving average."""


class HopGraph:
    """Hops as nodes of a graph: which can follow which.

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
        """The hops that can follow a hop; after ``None``, the first hops of pipelines."""
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
        """Whether the hop runs the last layer."""
        return hop.end == self._num_layers


class HopRouter(ABC):
    """Chooses a pipeline hop by hop; a subclass says how to pick the next hop."""

    def __init__(self, graph: HopGraph) -> None:
        self._graph = graph
        self.pipelines: list[Pipeline] = []
        self._indices: dict[Pipeline, int] = {}  # pipeline -> its index

    @abstractmethod
    def pick(self, hops: Sequence[Hop]) -> Hop:
        """The next hop, among some that have room."""

    def began(self, index: int) -> None:  # noqa: B027 - optional
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
        index = self.index_of(tuple(taken))
        self.began(index)
        return index

    def index_of(self, pipeline: Pipeline) -> int:
        """Its index; a pipeline that is new gets one."""
        if pipeline not in self._indices:
            self._indices[pipeline] = len(self.pipelines)
            self.pipelines.append(pipeline)
        return self._indices[pipeline]

    def widest(self, capacity: Mapping[str, int]) -> int:
        """The largest request that some pipeline holds, where each node holds ``capacity``; 0 without any pipeline."""
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
    """Picks the next node with equal probability."""

    def __init__(self, graph: HopGraph, rng: random.Random) -> None:
        super().__init__(graph)
        self._rng = rng

    def pick(self, hops: Sequence[Hop]) -> Hop:
        """One of them, at random."""
        return self._rng.choice(hops)


class ShortestQueueRouter(HopRouter):
    """Picks the node with the fewest requests in flight through it, all that a coordinator knows of its queue."""

    def __init__(self, graph: HopGraph) -> None:
        super().__init__(graph)
        self._in_flight: dict[str, int] = {}  # node -> requests that pass it

    def pick(self, hops: Sequence[Hop]) -> Hop:
        """The one with the fewest; among equals the first by name."""
        return min(hops, key=lambda hop: (self._in_flight.get(hop.node, 0), hop))

    def began(self, index: int) -> None:
        """Count it at its nodes."""
        for hop in self.pipelines[index]:
            self._in_flight[hop.node] = self._in_flight.get(hop.node, 0) + 1

    def ended(self, index: int) -> None:
        """Count it no more."""
        for hop in self.pipelines[index]:
            self._in_flight[hop.node] -= 1


class SwarmRouter(HopRouter):
    """Picks the next node with a probability proportional to its recently observed throughput.

    ``observed`` has to be called; a node without observations counts as the mean of the others.
    """

    def __init__(self, graph: HopGraph, rng: random.Random) -> None:
        super().__init__(graph)
        self._rng = rng
        self._tokens_per_s: dict[str, float] = {}  # node -> moving average

    def observed(self, node: str, tokens_per_s: float) -> None:
        """A node's tokens/s while it was busy."""
        before = self._tokens_per_s.get(node, tokens_per_s)
        self._tokens_per_s[node] = before + OBSERVED_WEIGHT * (tokens_per_s - before)

    def pick(self, hops: Sequence[Hop]) -> Hop:
        """One of them, drawn with these probabilities."""
        known = [self._tokens_per_s[hop.node] for hop in hops if hop.node in self._tokens_per_s]
        mean = sum(known) / len(known) if known else 1.0
        weights = [self._tokens_per_s.get(hop.node, mean) for hop in hops]
        return self._rng.choices(hops, weights)[0]


def make_router(
    plan: Plan,
    routing: Routing,
    *,
    seed: int = 0,
    is_connected: Callable[[str | None, str | None], bool] = lambda _src, _dst: True,
) -> Chooser:
    """The router of a routing.

    Args:
        plan: its flows are the weights of ``iwrr`` and ``fixed``; the others use its placement alone.
        routing: its name.
        seed: of the draws of ``random`` and ``swarm``.
        is_connected: whether work can go from one node to another; ``None`` for the coordinator.
    """
    if routing in ("iwrr", "fixed"):
        return Router(weighted_pipelines(pipelines(plan), routing=routing))
    if routing == "adaptive":
        rates = {name: node.capacity_tokens_per_s for name, node in plan.nodes.items()}
        return AdaptiveRouter(pipelines(plan), rates)
    graph = HopGraph(
        plan.placement,
        num_layers=plan.num_layers,
        partial=plan.assumptions.partial_inference,
        is_connected=is_connected,
    )
    rng = random.Random(f"routing {seed}")
    if routing == "random":
        return RandomRouter(graph, rng)
    return ShortestQueueRouter(graph) if routing == "shortest-queue" else SwarmRouter(graph, rng)


def peers_of(plan: Plan, router: Chooser) -> Mapping[str, frozenset[str]]:
    """Node -> nodes that it may have to send work on to."""
    if not isinstance(router, Router):  # its pipelines are made as requests come
        return {node: frozenset(plan.placement) - {node} for node in plan.placement}
    after: dict[str, set[str]] = {node: set() for node in plan.placement}
    for pipeline in router.pipelines:
        for hop, following in itertools.pairwise(pipeline):
            after[hop.node].add(following.node)
    return {node: frozenset(peers) for node, peers in after.items()}
