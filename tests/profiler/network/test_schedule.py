from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from helixbench.profiler.network.schedule import pack, rounds


@given(num_names=st.integers(0, 17))
def test_rounds_hold_every_ordered_pair_once_and_no_node_twice(num_names: int) -> None:
    names = [f"n{index}" for index in range(num_names)]

    schedule = rounds(names)

    assert sorted(itertools.chain(*schedule)) == sorted(itertools.permutations(names, 2))
    for pairs in schedule:
        busy = list(itertools.chain(*pairs))
        assert len(busy) == len(set(busy))
    if num_names >= 2:
        assert len(schedule) == 2 * (num_names - 1 + num_names % 2)


@given(st.data(), st.integers(2, 8))
def test_packed_pairs_are_all_there_and_no_node_is_twice_in_a_round(data: st.DataObject, num_names: int) -> None:
    pairs = data.draw(st.lists(st.sampled_from(list(itertools.permutations(range(num_names), 2))), unique=True))
    named = [(f"n{a}", f"n{b}") for a, b in pairs]

    packed = pack(named)

    assert sorted(itertools.chain(*packed)) == sorted(named)
    for together in packed:
        busy = list(itertools.chain(*together))
        assert len(busy) == len(set(busy))
    degree = Counter(itertools.chain(*named))
    assert len(packed) <= max(0, 2 * max(degree.values(), default=0) - 1)
