from __future__ import annotations

import itertools

import pytest

from helixbench.profiler.network.schedule import Pair
from helixbench.profiler.network.suspects import Attempt, bandwidth_of, confirmed_oddity, find_doubts

NAMES = ("a", "b", "c", "d")


def cluster(**rates: tuple[float, ...]) -> dict[Pair, list[Attempt]]:
    """All pairs of four nodes at 100 B/s, but for those given by name: ``ab=(20.0, 21.0)``."""
    return {
        (src, dst): [Attempt(bytes_per_s=rate) for rate in rates.get(src + dst, (100.0,))]
        for src, dst in itertools.permutations(NAMES, 2)
    }


def test_alike_links_are_not_doubted() -> None:
    assert find_doubts(cluster(ab=(80.0,), cd=(120.0,))) == {}


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (Attempt(bytes_per_s=None, error="unable to connect"), "unable to connect"),
        (Attempt(bytes_per_s=100.0, spread=0.4), "spread by 40%"),
        (Attempt(bytes_per_s=100.0, retransmitted=0.05), "5.0% of its segments"),
    ],
)
def test_a_measurement_that_is_bad_by_itself_is_doubted(attempt: Attempt, reason: str) -> None:
    attempts = cluster() | {("a", "b"): [attempt]}
    doubts = find_doubts(attempts)
    assert list(doubts) == [("a", "b")]
    assert reason in doubts["a", "b"].reason
    assert not doubts["a", "b"].by_comparison


def test_the_lower_of_two_directions_is_doubted() -> None:
    doubts = find_doubts(cluster(ab=(40.0,)))
    assert {pair: doubt.reason for pair, doubt in doubts.items()} == {("a", "b"): "40% of the reverse direction"}


def test_a_pair_below_the_others_of_both_ends_is_doubted_but_not_a_slow_node() -> None:
    assert set(find_doubts(cluster(ab=(30.0,), ba=(40.0,)))) == {("a", "b"), ("b", "a")}
    slow = {src + dst: (10.0,) for src, dst in itertools.permutations(NAMES, 2) if "a" in (src, dst)}
    assert find_doubts(cluster(**slow)) == {}


def test_a_slow_pair_whose_directions_agree_is_as_it_is() -> None:
    attempts = cluster(ab=(30.0,), ba=(31.0,))
    assert find_doubts(attempts) == {}
    assert confirmed_oddity(("a", "b"), attempts) == "30% of what is usual at both ends; the reverse direction agrees"


def test_what_comes_out_alike_twice_is_no_longer_doubted_by_comparison() -> None:
    attempts = cluster(ab=(31.0, 31.0), ba=(30.0, 60.0))
    assert set(find_doubts(attempts)) == {("b", "a")}, "its two measurements differ"
    assert confirmed_oddity(("a", "b"), attempts) == "31% of what is usual at both ends; a second measurement agrees"
    assert confirmed_oddity(("c", "d"), cluster(cd=(100.0, 101.0))) == "", "nothing is odd about it"


def test_one_outlier_of_three_is_outvoted() -> None:
    attempts = cluster(ab=(100.0, 60.0, 98.0))
    assert find_doubts(attempts) == {}
    assert bandwidth_of(attempts["a", "b"]) == 98.0
    assert list(find_doubts(cluster(ab=(100.0, 60.0, 80.0)))) == [("a", "b")]


def test_a_good_measurement_after_a_bad_one_ends_the_doubt() -> None:
    attempts = cluster()
    attempts["a", "b"] = [Attempt(bytes_per_s=None, error="lost"), Attempt(bytes_per_s=99.0, spread=0.0)]
    assert find_doubts(attempts) == {}


def test_bandwidth_is_the_median_of_what_was_measured() -> None:
    tried = [Attempt(bytes_per_s=rate) for rate in (10.0, None, 90.0, 100.0)]
    assert bandwidth_of(tried) == 90.0
    assert bandwidth_of([Attempt(bytes_per_s=None)]) is None
