"""The exact max-flow of a placement, and the proof of it: its min cut.

With partial inference and measured costs a node's time is shared by entries that cost differently, so the problem is a
small linear program. Its duals are the cut: shares of saturated resources that add up to the flow itself. Routing
follows the flow, so of all largest flows a plan takes the one that spreads work most evenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.flow.network import Network, Resource, ResourceKind, build_network
from helixbench.solver.flow.spread import cache_shares, prefer_even_use
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, LinkFlow, Placement
from helixbench.solver.problem.question import Question

RELATIVE_TOLERANCE = 1e-9

MANY_ARCS = 10_000
"""Above this the interior point method and crossover to a vertex are several times as fast as the simplex method."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class CutShare:
    """A saturated resource in the min cut, and the tokens/s of the max-flow that it accounts for.

    A resource that is x % larger raises the max-flow by at most x % of ``tokens_per_s``.
    """

    kind: ResourceKind
    name: str
    tokens_per_s: float


@dataclass(frozen=True)
class Flow:
    """A largest flow of a placement.

    Attributes:
        tokens_per_s: what leaves the coordinator.
        links: the links that carry some of it.
        entries: (node, entry layer) -> tokens/s; the range starts there or, with partial inference, later.
        cut: its min cut; the shares add up to ``tokens_per_s``.
    """

    tokens_per_s: float
    links: tuple[LinkFlow, ...]
    entries: Mapping[tuple[str, int], float]
    cut: tuple[CutShare, ...]

    def used(self, placement: Mapping[str, LayerRange]) -> Placement:
        """The placement without the nodes that carry none of it, by name."""
        carrying = {name for name, _ in self.entries}
        return {name: placement[name] for name in sorted(placement) if name in carrying}

    def through(self, name: str) -> float:
        """Tokens/s through a node, over all entries."""
        return sum(flow for (node, _), flow in self.entries.items() if node == name)


def max_flow(
    capacities: Capacities,
    placement: Mapping[str, LayerRange],
    *,
    partial: bool,
    spread: bool = False,
) -> Flow:
    """The largest flow coordinator -> ... -> coordinator that the placement can carry; 0 where no path exists.

    With ``spread`` the one among the largest that uses the nodes most evenly; it takes a second solve.
    """
    network = build_network(capacities, placement, partial=partial)
    return solve_network(network, shares=cache_shares(capacities, placement) if spread else None)


def largest_flow(question: Question, placement: Mapping[str, LayerRange], *, spread: bool = False) -> Flow:
    """The max-flow of a placement under a question's rules; see ``max_flow``."""
    return max_flow(question.capacities, placement, partial=question.partial, spread=spread)


def solve_network(network: Network, *, shares: Mapping[str, float] | None = None) -> Flow:
    """The largest flow through a network, with its cut; see ``max_flow``. It is spread where cache shares are given."""
    if not any(arc.src == COORDINATOR for arc in network.arcs):
        return Flow(0.0, (), {}, ())
    scale = _flow_scale(network.resources)
    # A link alone on its arc is a bound on a variable; what several arcs share is a row.
    shared = [resource for resource in network.resources if resource.kind != "link" and resource.use]
    upper = np.array([arc.capacity_tokens_per_s / scale for arc in network.arcs])
    solved = _solve_lp(network, shared, upper, scale, shares)
    values = solved.values[: len(network.arcs)]
    flows = np.where(values > RELATIVE_TOLERANCE, values, 0.0) * scale
    return _as_flow(network, flows, _cut(network, shared, solved, upper, scale))


@dataclass(frozen=True)
class _Solved:
    """Of the LP: the flow on each arc, and the marginal values of each shared resource and of each arc's own limit."""

    values: FloatArray
    resource_values: FloatArray
    limit_values: FloatArray


def _flow_scale(resources: tuple[Resource, ...]) -> float:
    """About the size of the flow, so that the LP's numbers are near one: the largest capacity of a node."""
    return max((1.0 / min(s for _, s in r.use) for r in resources if r.kind == "node" and r.use), default=1.0)


def _solve_lp(
    network: Network, shared: list[Resource], upper: FloatArray, scale: float, shares: Mapping[str, float] | None
) -> _Solved:
    """Most flow out of the coordinator: ``use <= 1`` of every shared resource, as much into each node as out of it."""
    import highspy

    columns: list[list[tuple[int, float]]] = [[] for _ in network.arcs]
    for row, resource in enumerate(shared):
        for number, share in resource.use:
            columns[number].append((row, share * scale))
    row_of = {name: len(shared) + number for number, name in enumerate(sorted(network.placement))}
    for number, arc in enumerate(network.arcs):
        if arc.dst != COORDINATOR:
            columns[number].append((row_of[arc.dst], 1.0))
        if arc.src != COORDINATOR:
            columns[number].append((row_of[arc.src], -1.0))
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(columns), len(shared) + len(row_of)
    lp.sense_ = highspy.ObjSense.kMaximize
    lp.col_cost_ = np.array([float(arc.src == COORDINATOR) for arc in network.arcs])
    lp.col_lower_, lp.col_upper_ = np.zeros(len(columns)), upper
    lp.row_lower_ = np.concatenate([np.full(len(shared), -np.inf), np.zeros(len(row_of))])
    lp.row_upper_ = np.concatenate([np.ones(len(shared)), np.zeros(len(row_of))])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.cumsum([0, *(len(column) for column in columns)])
    lp.a_matrix_.index_ = np.array([row for column in columns for row, _ in column], dtype=np.int32)
    lp.a_matrix_.value_ = np.array([value for column in columns for _, value in column])
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("threads", 1)
    highs.passModel(lp)
    if len(network.arcs) > MANY_ARCS:
        highs.setOptionValue("solver", "ipm")
        highs.run()
        highs.setOptionValue("solver", "simplex")  # starts from the vertex that crossover found
    _run(highs)
    solution = highs.getSolution()
    resource_values = np.array(solution.row_dual)[: len(shared)]
    limit_values = np.maximum(np.array(solution.col_dual), 0.0)
    best = highs.getInfo().objective_function_value
    if shares is not None and best > 0:
        prefer_even_use(highs, network, shared, shares, best=best, scale=scale)
        _run(highs)
    return _Solved(
        values=np.array(highs.getSolution().col_value), resource_values=resource_values, limit_values=limit_values
    )


def _run(highs: Any) -> None:
    import highspy

    highs.run()
    status = highs.getModelStatus()
    assert status == highspy.HighsModelStatus.kOptimal, f"max-flow LP: {highs.modelStatusToString(status)}"


def _cut(
    network: Network, shared: list[Resource], solved: _Solved, upper: FloatArray, scale: float
) -> tuple[CutShare, ...]:
    shares = [
        CutShare(resource.kind, resource.name, float(value) * scale)
        for resource, value in zip(shared, solved.resource_values, strict=True)
    ]
    shares += [
        CutShare("link", f"{arc.src} -> {arc.dst}", float(value * limit) * scale)
        for arc, value, limit in zip(network.arcs, solved.limit_values, upper, strict=True)
    ]
    shares = [share for share in shares if share.tokens_per_s > RELATIVE_TOLERANCE * scale]
    return tuple(sorted(shares, key=lambda share: (-share.tokens_per_s, share.kind, share.name)))


def _as_flow(network: Network, flows: FloatArray, cut: tuple[CutShare, ...]) -> Flow:
    entries: dict[tuple[str, int], float] = {}
    links: list[LinkFlow] = []
    total = 0.0
    for arc, amount in zip(network.arcs, map(float, flows), strict=True):
        if amount <= 0:
            continue
        links.append(
            LinkFlow(
                src=arc.src,
                dst=arc.dst,
                flow_tokens_per_s=amount,
                capacity_tokens_per_s=arc.capacity_tokens_per_s,
            )
        )
        if arc.src == COORDINATOR:
            total += amount
        if arc.dst != COORDINATOR:
            entries[arc.dst, arc.entry] = entries.get((arc.dst, arc.entry), 0.0) + amount
    return Flow(total, tuple(links), entries, cut)
