"""Chains of stages that admit alike: as short by dynamic programming as by the integer program; their order."""

from __future__ import annotations

import pytest

from helixbench.solver.placement.balanced_stages import _apart, _shortest, _shortest_by_program, _Stage

MEMBERS = {0: ["a", "b"], 1: ["c", "d", "e"]}


def seconds_of(chosen: list[tuple[_Stage, int]], seconds: dict[_Stage, float]) -> float:
    return sum(count * seconds[stage] for stage, count in chosen)


@pytest.mark.parametrize("num_layers", range(1, 13))
def test_both_ways_find_a_chain_as_short(num_layers: int) -> None:
    stages = [
        _Stage(kind, width, layers, 1.0, 1.0)
        for kind, longest in ((0, 3), (1, 2))
        for width in (1, 2)
        for layers in range(1, longest + 1)
    ]
    seconds = {s: 0.1 + s.layers * (0.9 if s.kind else 0.5) / s.width**0.5 for s in stages}

    found = _shortest(MEMBERS, stages, [seconds[s] for s in stages], num_layers)
    by_program = _shortest_by_program(MEMBERS, stages, [seconds[s] for s in stages], num_layers)

    assert bool(found) == bool(by_program) == (num_layers <= 2 * 3 + 3 * 2)
    if found:
        assert sum(stage.layers * count for stage, count in found) == num_layers
        for kind, names in MEMBERS.items():
            assert sum(stage.width * count for stage, count in found if stage.kind == kind) <= len(names)
        assert seconds_of(found, seconds) == pytest.approx(seconds_of(by_program, seconds), rel=2e-3)


def test_single_nodes_stand_between_nodes_side_by_side() -> None:
    pair, single, slow = _Stage(0, 2, 3, 1.0, 1.0), _Stage(1, 1, 7, 1.0, 9.0), _Stage(0, 1, 2, 1.0, 2.0)
    assert _apart([pair, pair, single, single, single]) == [pair, single, pair, single, single]
    assert _apart([pair, pair, single]) == [pair, single, pair]
    assert _apart([slow, pair, single]) == [pair, single, slow]
    assert _apart([pair, pair]) == [pair, pair]
