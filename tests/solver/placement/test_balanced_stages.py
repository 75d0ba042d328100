"""Chains of stages that admit alike: the shortest round, and the order of the stages."""

from __future__ import annotations

import itertools
import math

import pytest

from helixbench.solver.placement.balanced_stages import _apart, _shortest, _Stage

MEMBERS = {0: ["a", "b"], 1: ["c", "d", "e"]}


def shortest_by_trying_all(stages: list[_Stage], seconds: dict[_Stage, float], num_layers: int) -> float:
    """The least seconds of any counts of stages that hold all layers with the nodes there are; infinite for none."""
    best = math.inf
    for counts in itertools.product(*(range(len(MEMBERS[stage.kind]) // stage.width + 1) for stage in stages)):
        chosen = list(zip(stages, counts, strict=True))
        used = {kind: sum(s.width * count for s, count in chosen if s.kind == kind) for kind in MEMBERS}
        if sum(stage.layers * count for stage, count in chosen) == num_layers and all(
            used[kind] <= len(names) for kind, names in MEMBERS.items()
        ):
            best = min(best, sum(seconds[stage] * count for stage, count in chosen))
    return best


@pytest.mark.parametrize("num_layers", range(1, 13))
def test_the_chain_is_the_shortest_by_trying_all(num_layers: int) -> None:
    stages = [
        _Stage(kind, width, layers, 1.0, 1.0)
        for kind, longest in ((0, 3), (1, 2))
        for width in (1, 2)
        for layers in range(1, longest + 1)
    ]
    seconds = {s: 0.1 + s.layers * (0.9 if s.kind else 0.5) / s.width**0.5 for s in stages}

    found = _shortest(MEMBERS, stages, [seconds[s] for s in stages], num_layers)
    best = shortest_by_trying_all(stages, seconds, num_layers)

    assert bool(found) == (best < math.inf) == (num_layers <= 2 * 3 + 3 * 2)
    if found:
        assert sum(stage.layers * count for stage, count in found) == num_layers
        for kind, names in MEMBERS.items():
            assert sum(stage.width * count for stage, count in found if stage.kind == kind) <= len(names)
        assert sum(count * seconds[stage] for stage, count in found) == pytest.approx(best, rel=1e-3)


def test_single_nodes_stand_between_nodes_side_by_side() -> None:
    pair, single, slow = _Stage(0, 2, 3, 1.0, 1.0), _Stage(1, 1, 7, 1.0, 9.0), _Stage(0, 1, 2, 1.0, 2.0)
    assert _apart([pair, pair, single, single, single]) == [pair, single, pair, single, single]
    assert _apart([pair, pair, single]) == [pair, single, pair]
    assert _apart([slow, pair, single]) == [pair, single, slow]
    assert _apart([pair, pair]) == [pair, pair]
