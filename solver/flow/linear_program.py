"""The flow of a network as a linear program in HiGHS: for mixed resources, and for the choice among largest flows.

Arc formulation: a column for the flow over each edge, bounded by its capacity; a row of conservation for each vertex
but source and sink; a row ``sum(share * flow) <= 1`` for each mixed resource.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from helixbench.solver.flow.highs import load_highspy
from helixbench.solver.flow.network import SINK, SOURCE, Edge, Network
from helixbench.solver.problem.arrays import FloatArray

if TYPE_CHECKING:
    from highspy import Highs

MANY_EDGES = 10_000
"""Above this the interior point method and crossover to a vertex are several times as fast as the simplex method."""


class FlowProgram:
    """The program of one network. Flows are in units of ``scale`` tokens/s, so that the numbers are near one."""

    def __init__(self, network: Network) -> None:
        highspy = load_highspy()

        self.edges: list[Edge] = list(network.graph.edges)
        self.column = {edge: number for number, edge in enumerate(self.edges)}
        self.mixed = network.mixed  # rows 0, 1, ... in this order; conservation comes after them
        self.scale = max(
            (tokens_per_s for _, (kind, _), tokens_per_s in network.limits() if kind == "node"),
            default=max((1.0 / min(m.use.values()) for m in network.mixed), default=1.0),
        )
        inner = [vertex for vertex in network.graph if vertex not in (SOURCE, SINK)]
        row_of = {vertex: len(self.mixed) + number for number, vertex in enumerate(inner)}
        columns: list[dict[int, float]] = [{} for _ in self.edges]  # edge -> row -> coefficient
        for row, mixed in enumerate(self.mixed):
            for edge, share in mixed.use.items():
                columns[self.column[edge]][row] = share * self.scale
        for (tail, head), column in zip(self.edges, columns, strict=True):
            if head in row_of:
                column[row_of[head]] = 1.0
            if tail in row_of:
                column[row_of[tail]] = -1.0
        capacity = network.graph.edges(data="capacity", default=np.inf)
        self.upper: FloatArray = np.array([limit for _, _, limit in capacity]) / self.scale
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(columns), len(self.mixed) + len(inner)
        lp.sense_ = highspy.ObjSense.kMaximize
        lp.col_cost_ = np.array([float(tail == SOURCE) for tail, _ in self.edges])
        lp.col_lower_, lp.col_upper_ = np.zeros(len(columns)), self.upper
        lp.row_lower_ = np.concatenate([np.full(len(self.mixed), -np.inf), np.zeros(len(inner))])
        lp.row_upper_ = np.concatenate([np.ones(len(self.mixed)), np.zeros(len(inner))])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.start_ = np.cumsum([0, *map(len, columns)])
        lp.a_matrix_.index_ = np.array([row for column in columns for row in column], dtype=np.int32)
        lp.a_matrix_.value_ = np.array([value for column in columns for value in column.values()])
        self.highs: Highs = highspy.Highs()
        self.highs.setOptionValue("output_flag", False)
        self.highs.setOptionValue("threads", 1)
        self.highs.passModel(lp)

    def solve(self) -> FloatArray:
        """The flow over each edge at the optimum, in tokens/s."""
        highspy = load_highspy()

        if len(self.edges) > MANY_EDGES:
            self.highs.setOptionValue("solver", "ipm")
            self.highs.run()
            self.highs.setOptionValue("solver", "simplex")  # starts from the vertex that crossover found
        self.highs.run()
        status = self.highs.getModelStatus()
        assert status == highspy.HighsModelStatus.kOptimal, f"flow program: {self.highs.modelStatusToString(status)}"
        return np.array(self.highs.getSolution().col_value)[: len(self.edges)] * self.scale

    def prices(self) -> tuple[FloatArray, FloatArray]:
        """The duals of the solved program: of each mixed resource, and of each edge's capacity, in tokens/s.

        By strong duality they add up to the max-flow: together they are its min cut, with shares for mixed resources.
        """
        solution = self.highs.getSolution()
        of_mixed = np.array(solution.row_dual)[: len(self.mixed)]
        of_edges = np.maximum(np.array(solution.col_dual)[: len(self.edges)], 0.0)
        bounded = np.where(np.isfinite(self.upper), self.upper, 0.0)
        return of_mixed * self.scale, of_edges * bounded * self.scale
