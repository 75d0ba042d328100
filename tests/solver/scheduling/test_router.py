from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixbench.solver.problem.plan import Hop, Pipeline
from helixbench.solver.scheduling.router import CREDIT_WINDOW, AdaptiveRouter, Router, weighted_pipelines

ROUNDING = 1e-6


def pipeline(*nodes: str) -> Pipeline:
    return tuple(Hop(node, index, index + 1) for index, node in enumerate(nodes))


def router(weights: list[float]) -> Router:
    return Router([(pipeline(f"n{index}"), weight) for index, weight in enumerate(weights)])


def shares_ahead(weights: list[float], choices: list[int]) -> list[list[float]]:
    """After each choice, how many requests each pipeline has got beyond its share of them."""
    counts = [0] * len(weights)
    ahead = []
    for number, chosen in enumerate(choices, start=1):
        counts[chosen] += 1
        ahead.append([count - number * w / sum(weights) for count, w in zip(counts, weights, strict=True)])
    return ahead


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_no_pipeline_is_ever_a_request_ahead_of_its_share(weights: list[float]) -> None:
    made = router(weights)

    ahead = shares_ahead(weights, [made.choose(lambda _: True) or 0 for _ in range(80)])

    assert max(itertools.chain(*ahead)) < 1 + ROUNDING
    assert min(itertools.chain(*ahead)) > -max(1, len(weights) - 1) - ROUNDING


@given(weights=st.lists(st.floats(1e-2, 1e2), min_size=2, max_size=2))
def test_two_pipelines_keep_their_shares_within_one_request(weights: list[float]) -> None:
    made = router(weights)

    ahead = shares_ahead(weights, [made.choose(lambda _: True) or 0 for _ in range(80)])

    assert max(abs(value) for value in itertools.chain(*ahead)) < 1 + ROUNDING


@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=6), rounds=st.integers(1, 3))
def test_whole_shares_are_met_exactly(weights: list[int], rounds: int) -> None:
    made = router([float(weight) for weight in weights])

    choices = [made.choose(lambda _: True) for _ in range(rounds * sum(weights))]

    assert [choices.count(index) for index in range(len(weights))] == [rounds * weight for weight in weights]


def test_choices_are_interleaved() -> None:
    made = router([5.0, 1.0, 1.0])
    assert [made.choose(lambda _: True) for _ in range(7)] == [0, 0, 1, 0, 2, 0, 0]


def test_pipelines_without_room_are_passed_over_and_make_up_for_it() -> None:
    made = router([1.0, 1.0])
    only_second = [made.choose(lambda hops: hops[0].node == "n1") for _ in range(3)]
    both = [made.choose(lambda _: True) for _ in range(5)]

    assert only_second == [1, 1, 1]
    assert both == [0, 0, 0, 0, 1]


@given(masks=st.lists(st.sets(st.integers(0, 3)), max_size=40))
def test_only_pipelines_with_room_are_chosen(masks: list[set[int]]) -> None:
    made = router([4.0, 3.0, 2.0, 1.0])
    for mask in masks:
        chosen = made.choose(lambda hops, mask=mask: int(hops[0].node[1:]) in mask)
        assert chosen in mask if mask else chosen is None


def test_no_room_anywhere_leaves_the_credits_alone() -> None:
    interrupted, plain = router([3.0, 2.0, 1.0]), router([3.0, 2.0, 1.0])
    choices = []
    for _ in range(12):
        assert interrupted.choose(lambda _: False) is None
        choices.append(interrupted.choose(lambda _: True))
    assert choices == [plain.choose(lambda _: True) for _ in range(12)]


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0]])
def test_router_needs_pipelines_with_flow(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one pipeline, each with a flow > 0"):
        router(weights)


NODES = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True)


@given(weighted=st.dictionaries(NODES.map(lambda n: pipeline(*n)), st.floats(0.1, 10), min_size=1, max_size=8))
def test_fixed_routing_gives_pipelines_without_a_node_in_common(weighted: dict[Pipeline, float]) -> None:
    fixed = weighted_pipelines(list(weighted.items()), routing="fixed")
    nodes = [hop.node for hops, _ in fixed for hop in hops]

    assert len(nodes) == len(set(nodes))
    assert set(fixed) <= set(weighted.items())
    assert fixed[0][1] == max(weighted.values())
    left_out = set(weighted) - {hops for hops, _ in fixed}
    assert all({hop.node for hop in hops} & set(nodes) for hops in left_out), "one more pipeline had its nodes free"


def test_iwrr_routing_takes_all_pipelines_as_they_are() -> None:
    weighted = [(pipeline("a", "b"), 2.0), (pipeline("a", "c"), 1.0)]
    assert weighted_pipelines(weighted, routing="iwrr") == tuple(weighted)


def test_adaptive_takes_the_least_busy_of_those_that_are_owed_nearly_the_most() -> None:
    fast, slow = (Hop("fast", 0, 8),), (Hop("slow", 0, 8),)
    router = AdaptiveRouter([(fast, 1.0), (slow, 1.0)], {"fast": 100.0, "slow": 40.0})

    first = [router.choose(lambda _: True) for _ in range(2)]
    assert [router.pipelines[index] for index in first if index is not None] == [fast, fast]

    chosen = [router.choose(lambda _: True) for _ in range(198)]
    assert abs(chosen.count(router.index_of(slow)) - 100) <= CREDIT_WINDOW + 1, "shares are those of the weights"


def test_adaptive_avoids_a_node_that_has_become_slow_within_its_share() -> None:
    one, other = (Hop("one", 0, 8),), (Hop("other", 0, 8),)
    router = AdaptiveRouter([(one, 1.0), (other, 1.0)], {"one": 100.0, "other": 100.0})
    router.set_ratios({"one": 3.0})

    index = router.choose(lambda _: True)
    assert index is not None
    assert router.pipelines[index] == other
    assert router.choose(lambda pipeline: pipeline == one) == router.index_of(one), "where nothing else has room"
    assert router.choose(lambda _: False) is None
