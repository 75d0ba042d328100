"""Routings that put a pipeline together hop by hop."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixbench.solver.problem.plan import Hop, LayerRange, Pipeline
from helixbench.solver.scheduling.router import Router
from helixbench.solver.scheduling.routings import HopGraph, HopRouter, RandomRouter, ShortestQueueRouter, SwarmRouter

LAYERS = 6
PLACEMENT = {
    "a": LayerRange(0, 3), "b": LayerRange(0, 2), "c": LayerRange(2, 4), "d": LayerRange(3, 6), "e": LayerRange(1, 6)
}  # fmt: skip
MAKERS: dict[str, Callable[[HopGraph], HopRouter]] = {
    "random": lambda graph: RandomRouter(graph, random.Random(0)),
    "shortest queue": ShortestQueueRouter,
    "swarm": lambda graph: SwarmRouter(graph, random.Random(0)),
}


def graph(placement: dict[str, LayerRange] | None = None, *, partial: bool = True) -> HopGraph:
    return HopGraph(placement or PLACEMENT, num_layers=LAYERS, partial=partial)


def everything(pipeline: Pipeline) -> bool:
    return True


def nodes_of(router: HopRouter, index: int | None) -> tuple[str, ...]:
    assert index is not None
    return tuple(hop.node for hop in router.pipelines[index])


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
@given(full=st.sets(st.sampled_from(sorted(PLACEMENT))))
def test_a_pipeline_covers_the_model_and_passes_only_nodes_with_room(
    maker: Callable[[HopGraph], HopRouter], full: set[str]
) -> None:
    router = maker(graph())
    index = router.choose(lambda hops: all(hop.node not in full for hop in hops))
    can_be_done = any(
        not set(path) & full
        for path in (("a", "d"), ("a", "e"), ("a", "c", "d"), ("b", "e"), ("b", "c", "d"), ("b", "c", "e"))
    )
    assert (index is not None) == can_be_done
    if index is not None:
        pipeline = router.pipelines[index]
        assert [hop.start for hop in pipeline] == [0, *(hop.end for hop in pipeline[:-1])]
        assert pipeline[-1].end == LAYERS
        assert not {hop.node for hop in pipeline} & full


def test_without_partial_inference_ranges_are_entered_at_their_start() -> None:
    router = RandomRouter(graph(partial=False), random.Random(1))
    taken = {nodes_of(router, router.choose(everything)) for _ in range(60)}
    assert taken == {("a", "d"), ("b", "c")} - {("b", "c")}


def test_random_takes_every_next_node_alike() -> None:
    router = RandomRouter(graph(), random.Random(3))
    first = Counter(nodes_of(router, router.choose(everything))[0] for _ in range(600))
    assert first["a"] == pytest.approx(300, abs=60)


def test_shortest_queue_evens_out_what_is_in_flight() -> None:
    router = ShortestQueueRouter(graph({"x": LayerRange(0, 6), "y": LayerRange(0, 6)}))
    chosen = [router.choose(everything) for _ in range(4)]
    assert [nodes_of(router, index) for index in chosen] == [("x",), ("y",), ("x",), ("y",)]
    for _ in range(2):
        assert chosen[0] is not None
        router.ended(chosen[0])
    assert nodes_of(router, router.choose(everything)) == ("x",)
    assert nodes_of(router, router.choose(everything)) == ("x",)


def test_swarm_follows_observed_throughput() -> None:
    router = SwarmRouter(graph({"x": LayerRange(0, 6), "y": LayerRange(0, 6)}), random.Random(0))
    before = Counter(nodes_of(router, router.choose(everything)) for _ in range(400))
    assert before[("x",)] == pytest.approx(200, abs=50)
    for _ in range(100):
        router.observed("x", 300.0)
        router.observed("y", 100.0)
    after = Counter(nodes_of(router, router.choose(everything)) for _ in range(400))
    assert after[("x",)] == pytest.approx(300, abs=40)


def test_swarm_forgets_what_was_long_ago() -> None:
    router = SwarmRouter(graph({"x": LayerRange(0, 6), "y": LayerRange(0, 6)}), random.Random(0))
    router.observed("x", 1e6)
    for _ in range(200):
        router.observed("x", 1.0)
        router.observed("y", 1.0)
    chosen = Counter(nodes_of(router, router.choose(everything)) for _ in range(400))
    assert chosen[("x",)] == pytest.approx(200, abs=50)


@given(sizes=st.dictionaries(st.sampled_from(sorted(PLACEMENT)), st.integers(1, 50), min_size=5))
def test_the_widest_pipeline_is_the_same_as_among_all_of_them(sizes: dict[str, int]) -> None:
    paths = (("a", "d"), ("a", "e"), ("b", "c", "d"), ("b", "e"), ("b", "c", "e"), ("a", "c", "d"), ("a", "c", "e"))
    listed = Router([(tuple(Hop(node, i, i + 1) for i, node in enumerate(path)), 1.0) for path in paths])
    assert ShortestQueueRouter(graph()).widest(sizes) == listed.widest(sizes)


def test_nodes_that_are_not_connected_do_not_follow() -> None:
    blocked = HopGraph(
        PLACEMENT,
        num_layers=LAYERS,
        partial=True,
        is_connected=lambda src, dst: (src, dst) not in {("a", "d"), ("e", None)},
    )
    router = RandomRouter(blocked, random.Random(0))
    taken = {nodes_of(router, router.choose(everything)) for _ in range(80)}
    assert taken == {("a", "c", "d"), ("b", "c", "d"), ("b", "a", "c", "d")}
