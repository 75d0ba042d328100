"""Simulated annealing over placements, links included: from the best placement towards a flow a little above it.

The energy is how much is missing to that flow: in the max-flow, which does not tell at which layer, and in each layer's
capacity, which does but knows no links. Source: Kirkpatrick, Gelatt and Vecchi, 1983.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from helixbench.solver.flow.fast_flow import FastFlow
from helixbench.solver.placement.segments import stock_of
from helixbench.solver.problem.arrays import FloatArray, IntArray
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Placement

MOVES_PER_NODE = 1000
"""Moves of one cooling; then it starts again, hot, from where it is."""

HOTTEST = 0.02
"""Temperature at the start of a cooling, as a share of the target flow."""

AIM = 1.015
"""Target flow, as a multiple of the best so far."""

LAYERS_WEIGH = 4.0
"""Weight of the layers' mean shortfall against the max-flow's shortfall."""

NOISE = 0.1
"""Noise in the choice of a new place for a node, as a share of the target flow, so that it is not always the same."""


def annealed(
    capacities: Capacities,
    start: Mapping[str, LayerRange],
    *,
    bound: float,
    coolings: int,
    may_go_on: Callable[[], bool],
    seed: int,
) -> Iterator[Placement]:
    """Placements that carry more than all before, as they are found.

    Args:
        capacities: of the nodes; pinned nodes stay where they are.
        start: the placement to start from.
        bound: no placement carries more.
        coolings: how many times to start hot.
        may_go_on: asked before each move.
        seed: of the moves.
    """
    state = _State(capacities, start, rng=np.random.default_rng(seed))
    if not state.free:
        return
    best = state.flow
    aim = min(bound, best * AIM)
    moves = MOVES_PER_NODE * len(capacities.nodes)
    for _ in range(coolings):
        for move in range(moves):
            if not may_go_on():
                return
            state.step(aim, HOTTEST * aim * (1 - move / moves) ** 2)
            if state.flow > best * (1 + 1e-6) and state.is_covered():
                best = state.flow
                aim = min(bound, best * AIM)
                yield state.placement()


class _State:
    """A placement as arrays over the nodes. It owns them; a move that is not kept is undone."""

    def __init__(self, capacities: Capacities, start: Mapping[str, LayerRange], *, rng: np.random.Generator) -> None:
        self._capacities, self._rng = capacities, rng
        self._names = list(capacities.nodes)
        self._num_layers = capacities.model.num_layers
        self._network = FastFlow(capacities)
        rates = stock_of(capacities, self._names).rates
        self._rates = [rates.get(capacities.kind(name), np.zeros(0)) for name in self._names]
        self.free = [node for node, table in enumerate(self._rates) if len(table)]
        size = len(self._names)
        self._start: IntArray = np.zeros(size, dtype=np.int64)
        self._end: IntArray = np.zeros(size, dtype=np.int64)
        self._rate: FloatArray = np.zeros(size)
        self._cover: FloatArray = np.zeros(self._num_layers)
        self._holding: IntArray = np.zeros(self._num_layers, dtype=np.int64)
        for node, name in enumerate(self._names):
            if name in start:
                rate = None if len(self._rates[node]) else capacities.tokens_per_s(name, start[name])
                self._put(node, start[name].start, start[name].end, rate)
        self.flow = self._network.tokens_per_s(self._start, self._end, self._rate)

    def placement(self) -> Placement:
        """As ranges; nodes that hold nothing are left out."""
        held = zip(self._names, self._start.tolist(), self._end.tolist(), strict=True)
        placement = {name: LayerRange(start, end) for name, start, end in held if start < end}
        return {name: held for name, held in placement.items() if self._capacities.can_hold(name, held)}

    def is_covered(self) -> bool:
        """Whether every layer is held by as many nodes as the placement has to survive the loss of, and one more."""
        return bool(self._holding.min() > self._capacities.survive)

    def step(self, aim: float, heat: float) -> None:
        """Make a random move, and undo it where it is too much worse.

        Metropolis: a move that raises the energy by ``d`` is kept with probability ``exp(-d / heat)``. The threshold is
        drawn first, so that a move whose scarcest layer alone is too short is undone without a max-flow.
        """
        before = self._start.copy(), self._end.copy(), self._rate.copy(), self._cover.copy(), self._holding.copy()
        most = self._short(aim) + max(0.0, aim - self.flow) + heat * float(self._rng.exponential())
        kind = int(self._rng.integers(5))
        if self._replace(aim) if kind < 2 else (self._swap, self._resize, self._move_boundary)[kind - 2]():
            short = self._short(aim)
            if short + max(0.0, aim - float(self._cover.min())) <= most:
                flow = self._network.tokens_per_s(self._start, self._end, self._rate)
                if short + max(0.0, aim - flow) <= most:
                    self.flow = flow
                    return
        self._start, self._end, self._rate, self._cover, self._holding = before

    def _short(self, aim: float) -> float:
        """The part of the energy that layers make up; the other is what the max-flow falls short of the target."""
        short = np.maximum(0.0, aim - self._cover)
        if self._capacities.survive:
            short += aim * np.maximum(0, 1 + self._capacities.survive - self._holding)
        return LAYERS_WEIGH * float(short.mean())

    def _put(self, node: int, start: int, end: int, rate: float | None = None) -> None:
        """Give a node another range, or none where ``start == end``."""
        self._cover[self._start[node] : self._end[node]] -= self._rate[node]
        self._holding[self._start[node] : self._end[node]] -= 1
        known = float(self._rates[node][end - start - 1]) if rate is None and end > start else 0.0
        self._start[node], self._end[node], self._rate[node] = start, end, known if rate is None else rate
        self._cover[start:end] += self._rate[node]
        self._holding[start:end] += 1

    def _fits(self, node: int, start: int, end: int) -> bool:
        return 0 <= start <= end <= self._num_layers and end - start <= len(self._rates[node])

    def _any(self) -> int:
        return self.free[int(self._rng.integers(len(self.free)))]

    def _replace(self, aim: float) -> bool:
        """A node goes where it adds most to layers that fall short, give or take some noise."""
        node = self._any()
        self._put(node, 0, 0)
        rates, layers = self._rates[node], self._num_layers
        gained = np.zeros((len(rates), layers + 1))
        needed = np.maximum(0.0, aim - self._cover)
        np.cumsum(np.minimum(rates[:, None], needed[None, :]), axis=1, out=gained[:, 1:])
        starts = np.arange(layers)[None, :]
        ends = starts + np.arange(1, len(rates) + 1)[:, None]
        gain = np.take_along_axis(gained, np.minimum(ends, layers), axis=1) - gained[:, :layers]
        gain = np.where(ends <= layers, gain + NOISE * aim * self._rng.gumbel(size=gain.shape), -np.inf)
        length, start = divmod(int(np.argmax(gain)), layers)
        self._put(node, start, start + length + 1)
        return True

    def _swap(self) -> bool:
        """Two nodes take each other's ranges."""
        a, b = self._any(), self._any()
        of_a, of_b = (self._start[a], self._end[a]), (self._start[b], self._end[b])
        if of_a == of_b or not (self._fits(a, *of_b) and self._fits(b, *of_a)):
            return False
        self._put(a, int(of_b[0]), int(of_b[1]))
        self._put(b, int(of_a[0]), int(of_a[1]))
        return True

    def _resize(self) -> bool:
        """A node's range moves, grows or shrinks by a layer."""
        node = self._any()
        start = int(self._start[node] + self._rng.integers(-1, 2))
        end = int(self._end[node] + self._rng.integers(-1, 2))
        if not (start < end and self._fits(node, start, end)):
            return False
        self._put(node, start, end)
        return True

    def _move_boundary(self) -> bool:
        """Every range that starts or ends at one boundary does so a layer or two further on."""
        cut = int(self._rng.choice(np.concatenate([self._start[self.free], self._end[self.free]])))
        to = cut + int(self._rng.choice((-2, -1, 1, 2)))
        if cut in (0, self._num_layers) or not 0 < to < self._num_layers:
            return False
        moved = []
        for node in self.free:
            start, end = int(self._start[node]), int(self._end[node])
            if cut in (start, end) and start < end:
                new = (to if start == cut else start, to if end == cut else end)
                if not (new[0] < new[1] and self._fits(node, *new)):
                    return False
                moved.append((node, *new))
        for node, start, end in moved:
            self._put(node, start, end)
        return bool(moved)
