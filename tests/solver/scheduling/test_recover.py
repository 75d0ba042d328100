from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from helixbench.solver.problem.plan import Hop, LayerRange, Pipeline
from helixbench.solver.scheduling.recover import Recovery, best_recovery

LAYERS = 8
PLACEMENT = {
    "a": LayerRange(0, 4),
    "a2": LayerRange(0, 4),
    "b": LayerRange(4, 8),
    "b2": LayerRange(2, 8),
}


def recovery(
    before: Pipeline,
    *lost: str,
    placement: dict[str, LayerRange] = PLACEMENT,
    keeps: frozenset[str] = frozenset({"a", "a2", "b", "b2"}),
    broken: frozenset[tuple[str | None, str | None]] = frozenset(),
) -> Recovery | None:
    return best_recovery(
        before,
        num_tokens=10,
        placement=placement,
        num_layers=LAYERS,
        is_usable=lambda node: node not in lost,
        is_whole=lambda _node: True,
        is_connected=lambda src, dst: (src, dst) not in broken,
        keeps_inputs=lambda node: node in keeps,
        seconds=lambda hop, tokens: float((hop.end - hop.start) * tokens),
    )


A_B = (Hop("a", 0, 4), Hop("b", 4, 8))


def test_a_lost_last_node_is_replayed_from_the_node_before_it() -> None:
    found = recovery(A_B, "b")

    assert found is not None
    assert found.hops == (Hop("a", 0, 4), Hop("b2", 4, 8))
    assert (found.first, found.num_rebuilt, found.source, found.layers) == (1, 1, "a", 4)


def test_without_kept_inputs_the_prompt_enters_at_the_coordinator_again() -> None:
    found = recovery(A_B, "b", keeps=frozenset())

    assert found is not None
    assert (found.first, found.num_rebuilt, found.source, found.layers) == (0, 2, None, 8)


def test_a_lost_first_node_leaves_the_caches_behind_it_alone() -> None:
    found = recovery(A_B, "a")

    assert found is not None
    assert found.hops == (Hop("a2", 0, 4), Hop("b", 4, 8))
    assert (found.first, found.num_rebuilt, found.source, found.layers) == (0, 1, None, 4)


def test_a_broken_link_alone_loses_no_cache_where_another_way_leads_on() -> None:
    before = (Hop("a", 0, 4), Hop("b", 4, 8))
    found = recovery(before, "a2", broken=frozenset({("a", "b")}))

    assert found is not None
    assert found.hops == (Hop("a", 0, 4), Hop("b2", 4, 8))
    assert (found.first, found.layers) == (1, 4)


def test_messages_lost_on_a_link_that_is_up_again_lose_no_cache() -> None:
    found = recovery(A_B)

    assert found is not None
    assert (found.hops, found.num_rebuilt, found.layers, found.seconds) == (A_B, 0, 0, 0.0)


def test_nothing_is_found_where_a_layer_is_held_by_no_one() -> None:
    assert recovery(A_B, "a", "a2") is None


def ways(before: Pipeline, placement: dict[str, LayerRange], usable: set[str]) -> Iterator[tuple[Pipeline, int]]:
    """Every pipeline over usable nodes with every entry whose part in front is that of the old pipeline."""

    def from_layer(layer: int) -> Iterator[Pipeline]:
        if layer == LAYERS:
            yield ()
        for node in sorted(usable):
            held = placement[node]
            if held.start <= layer < held.end:
                for rest in from_layer(held.end):
                    yield (Hop(node, layer, held.end), *rest)

    for hops in from_layer(0):
        for entry in range(min(len(hops), len(before))):
            if hops[:entry] == before[:entry]:
                yield hops, entry


def price(before: Pipeline, hops: Pipeline, entry: int, speed: dict[str, float], tokens: int) -> float:
    """Seconds of every node from the entry to the last one whose cache is lost."""
    cached = {hop.node: hop.start for hop in before}
    lost = [i for i, hop in enumerate(hops) if i >= entry and cached.get(hop.node, LAYERS) > hop.start]
    again = hops[entry : lost[-1] + 1] if lost else ()
    return sum(tokens * (hop.end - hop.start) * speed[hop.node] for hop in again)


@pytest.mark.parametrize("seed", range(60))
def test_the_cheapest_of_all_ways_is_found(seed: int) -> None:
    rng = random.Random(seed)
    placement = {}
    for index in range(rng.randint(3, 7)):
        start = rng.randint(0, LAYERS - 1)
        placement[f"n{index}"] = LayerRange(start, rng.randint(start + 1, LAYERS))
    speed = {node: rng.uniform(0.5, 2.0) for node in placement}
    everything = [hops for hops, entry in ways((Hop("none", 0, 1),), placement, set(placement)) if entry == 0]
    if not everything:
        assert best_of(placement, speed, ((Hop("n0", 0, 1)),), set(placement), set()) is None
        return
    before = rng.choice(everything)
    usable = set(placement) - {rng.choice(before).node}
    keeping = {node for node in placement if rng.random() < 0.6}

    found = best_of(placement, speed, before, usable, keeping)

    allowed = [
        (hops, entry)
        for hops, entry in ways(before, placement, usable)
        if entry == 0 or before[entry - 1].node in keeping
    ]
    if found is None:
        assert allowed == []
        return
    assert (found.hops, found.first) in allowed
    assert found.seconds == pytest.approx(price(before, found.hops, found.first, speed, 5))
    assert found.seconds == pytest.approx(min(price(before, hops, entry, speed, 5) for hops, entry in allowed))
    ends = list(itertools.pairwise(found.hops))
    assert all(left.end == right.start for left, right in ends)


def best_of(
    placement: dict[str, LayerRange], speed: dict[str, float], before: Pipeline, usable: set[str], keeping: set[str]
) -> Recovery | None:
    return best_recovery(
        before,
        num_tokens=5,
        placement=placement,
        num_layers=LAYERS,
        is_usable=lambda node: node in usable,
        is_whole=lambda _node: True,
        is_connected=lambda _src, _dst: True,
        keeps_inputs=lambda node: node in keeping,
        seconds=lambda hop, tokens: tokens * (hop.end - hop.start) * speed[hop.node],
    )
