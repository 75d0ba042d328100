"""Router: the pipeline of each request, by interleaved weighted round robin. Pure: its only state are its choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from helixbench.solver.problem.plan import Pipeline
from helixbench.solver.scheduling.work import Routing


class Chooser(Protocol):
    """Chooses a pipeline for each request; what a coordinator needs of a router."""

    @property
    def pipelines(self) -> Sequence[Pipeline]:
        """Every pipeline that was or can be chosen, by index; the list only grows."""
        ...

    def choose(self, has_room: Callable[[Pipeline], bool]) -> int | None:
        """Index of the pipeline that the next request takes; ``None`` where none has room."""
        ...

    def ended(self, index: int) -> None:
        """A request that took this pipeline has ended."""
        ...

    def index_of(self, pipeline: Pipeline) -> int:
        """Index of a pipeline that ``choose`` need not have given."""
        ...

    def began(self, index: int) -> None:
        """A request takes this pipeline without having been given it by ``choose``: after a loss."""
        ...

    def widest(self, capacity: Mapping[str, int]) -> int:
        """The largest request that some pipeline holds, where each node holds ``capacity``."""
        ...


class Router:
    """Interleaved weighted round robin (IWRR) over pipelines, weights = planned flows.

    Every choice gives each pipeline credit in proportion to its weight and takes the one with the most. So no pipeline
    is ever a whole request ahead of its share, and shares are met exactly whenever all of them are whole requests. A
    pipeline without room is passed over and keeps its credit.
    Source: Helix, ASPLOS 2025, section 5.1 (per-request pipelines), with whole pipelines as the elements of the round.
    """

    def __init__(self, weighted: Sequence[tuple[Pipeline, float]]) -> None:
        if not weighted or any(weight <= 0 for _, weight in weighted):
            raise ValueError("need at least one pipeline, each with a flow > 0")
        self.pipelines: list[Pipeline] = []
        self._shares: list[float] = []  # of the requests, by pipeline; 0 for one that new requests do not take
        self._credits: list[float] = []  # requests that each pipeline is owed
        self._indices: dict[Pipeline, int] = {}
        self.set_weights(weighted)

    def set_weights(self, weighted: Sequence[tuple[Pipeline, float]]) -> None:
        """New requests take these pipelines from now on. One that was taken before keeps its index and its credit."""
        total = sum(weight for _, weight in weighted)
        self._shares = [0.0] * len(self.pipelines)
        for pipeline, weight in weighted:
            self._shares[self.index_of(pipeline)] = weight / total

    def index_of(self, pipeline: Pipeline) -> int:
        """Its index; a pipeline that is new gets one, and no share of the requests."""
        if pipeline not in self._indices:
            self._indices[pipeline] = len(self.pipelines)
            self.pipelines.append(pipeline)
            self._shares.append(0.0)
            self._credits.append(0.0)
        return self._indices[pipeline]

    @property
    def shares(self) -> dict[Pipeline, float]:
        """Pipeline -> share of the requests, of those that new requests take."""
        return {pipeline: share for pipeline, share in zip(self.pipelines, self._shares, strict=True) if share > 0}

    def choose(self, has_room: Callable[[Pipeline], bool]) -> int | None:
        """Index of the pipeline that the next request takes; ``None``, and no credit changes, where none has room."""
        credits_now = [before + share for before, share in zip(self._credits, self._shares, strict=True)]
        chosen = self._pick(credits_now, has_room)
        if chosen is None:
            return None
        credits_now[chosen] -= 1.0
        self._credits = credits_now
        return chosen

    def _pick(self, credits_now: Sequence[float], has_room: Callable[[Pipeline], bool]) -> int | None:
        """The pipeline with the most credit, of those with room."""
        chosen, most = None, -math.inf
        for index, credit in enumerate(credits_now):  # asking for room is what takes time
            if credit > most and self._shares[index] > 0 and has_room(self.pipelines[index]):
                chosen, most = index, credit
        return chosen

    def began(self, index: int) -> None:
        """Nothing to do: what moves was counted when it first began."""

    def ended(self, index: int) -> None:
        """Nothing to do: shares count requests when they begin."""

    def widest(self, capacity: Mapping[str, int]) -> int:
        """The largest request that some pipeline holds, where each node holds ``capacity``."""
        return max(min(capacity[hop.node] for hop in pipeline) for pipeline in self.shares)


CREDIT_WINDOW = 2.0
"""Requests by which ``adaptive`` lets a pipeline fall behind the one that is owed the most."""


class AdaptiveRouter(Router):
    """Interleaved weighted round robin with a choice: of the pipelines that are owed nearly the most, the least busy.

    A request is predicted to take, at each node of a pipeline, in proportion to the requests that pass the node and to
    the time that the node takes for a token. Shares stay those of the weights over any longer time, for a pipeline that
    was passed over keeps its credit, so no node starves and none is herded.

    Args:
        weighted: pipelines with their flows.
        tokens_per_s: node -> what it carries, as planned.
    """

    def __init__(self, weighted: Sequence[tuple[Pipeline, float]], tokens_per_s: Mapping[str, float]) -> None:
        super().__init__(weighted)
        self._token_s = {node: 1 / rate for node, rate in tokens_per_s.items() if rate > 0}
        self._ratios: Mapping[str, float] = {}  # node -> measured over predicted time
        self._passing: dict[str, int] = {}  # node -> requests in flight that pass it

    def set_ratios(self, ratios: Mapping[str, float]) -> None:
        """Nodes take this many times their planned time."""
        self._ratios = ratios

    def choose(self, has_room: Callable[[Pipeline], bool]) -> int | None:
        """See ``Router.choose``."""
        index = super().choose(has_room)
        if index is not None:
            self.began(index)
        return index

    def began(self, index: int) -> None:
        """Count it at its nodes."""
        for hop in self.pipelines[index]:
            self._passing[hop.node] = self._passing.get(hop.node, 0) + 1

    def ended(self, index: int) -> None:
        """Count it no more."""
        for hop in self.pipelines[index]:
            self._passing[hop.node] -= 1

    def _pick(self, credits_now: Sequence[float], has_room: Callable[[Pipeline], bool]) -> int | None:
        open_ones = [
            index for index, pipeline in enumerate(self.pipelines) if self._shares[index] > 0 and has_room(pipeline)
        ]
        most = max((credits_now[index] for index in open_ones), default=0.0)
        near = [index for index in open_ones if credits_now[index] > most - CREDIT_WINDOW]
        return min(near, key=lambda index: (self._seconds(index), -credits_now[index]), default=None)

    def _seconds(self, index: int) -> float:
        """What the next request would take, in units that are the same for all pipelines."""
        return sum(
            (1 + self._passing.get(hop.node, 0)) * self._token_s.get(hop.node, 0.0) * self._ratios.get(hop.node, 1.0)
            for hop in self.pipelines[index]
        )


def weighted_pipelines(
    weighted: Sequence[tuple[Pipeline, float]], *, routing: Routing
) -> tuple[tuple[Pipeline, float], ...]:
    """The pipelines that a routing chooses from.

    ``iwrr``: all of them with their flows. ``fixed``, as a baseline: pipelines that share no node, the one with the
    largest flow first, as in a server that assigns each node to one pipeline.
    """
    if routing != "fixed":
        return tuple(weighted)
    taken: set[str] = set()
    fixed = []
    for pipeline, weight in sorted(weighted, key=lambda pair: (-pair[1], pair[0])):
        nodes = {hop.node for hop in pipeline}
        if not nodes & taken:
            fixed.append((pipeline, weight))
            taken |= nodes
    return tuple(fixed)
