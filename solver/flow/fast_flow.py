"""A placement's max-flow in half a millisecond, for annealing, which asks tens of thousands of times.

That is a quarter of the time or less of building the graph and solving it: here the network is one dense matrix.

One capacity for each node and each link, in whole thousandths of a token/s. NICs and time shared by entries of
different cost are left to the exact answer (``flow.max_flow``), which every plan is checked by.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.problem.arrays import FloatArray, IntArray
from helixbench.solver.problem.capacity import Capacities

UNITS_PER_TOKEN = 1000.0
MOST_UNITS = 2.0e9


class FastFlow:
    """The links of a cluster, ready to ask about placements of its nodes in their order."""

    def __init__(self, capacities: Capacities) -> None:
        names = list(capacities.nodes)
        table = capacities.links
        model = capacities.model
        self._num_layers, self._partial = model.num_layers, capacities.partial
        self._between = _units(
            [[table.bandwidth(a, b) or 0.0 if a != b else 0.0 for b in names] for a in names],
            model.activation_bytes_per_token,
        )
        self._from_source = _units([table.bandwidth(COORDINATOR, name) or 0.0 for name in names], model.token_bytes)
        self._to_sink = _units([table.bandwidth(name, COORDINATOR) or 0.0 for name in names], model.token_bytes)

    def tokens_per_s(self, start: IntArray, end: IntArray, rate: FloatArray) -> float:
        """Max-flow of nodes that hold ``[start, end)`` (nothing where equal) and carry ``rate`` tokens/s each."""
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import maximum_flow

        size = len(start)
        holds = end > start
        enters = start[None, :] <= end[:, None] if self._partial else start[None, :] == end[:, None]
        enters &= (end[:, None] < end[None, :]) & holds[:, None] & holds[None, :]
        # Vertices: the source, the nodes' entries, the nodes' exits, the sink.
        units = np.zeros((2 * size + 2, 2 * size + 2), dtype=np.int32)
        units[0, 1 : size + 1] = np.where(holds & (start == 0), self._from_source, 0)
        units[1 + np.arange(size), 1 + size + np.arange(size)] = np.minimum(rate * UNITS_PER_TOKEN, MOST_UNITS)
        units[size + 1 : 2 * size + 1, 1 : size + 1] = np.where(enters, self._between, 0)
        units[size + 1 : 2 * size + 1, 2 * size + 1] = np.where(holds & (end == self._num_layers), self._to_sink, 0)
        return float(maximum_flow(csr_array(units), 0, 2 * size + 1).flow_value) / UNITS_PER_TOKEN


def _units(bytes_per_s: list[list[float]] | list[float], bytes_per_token: float) -> NDArray[np.int32]:
    return np.minimum(np.array(bytes_per_s) / bytes_per_token * UNITS_PER_TOKEN, MOST_UNITS).astype(np.int32)
