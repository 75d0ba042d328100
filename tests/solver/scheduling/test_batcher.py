from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixbench.solver.scheduling.batcher import Batcher, Chunk
from helixbench.solver.scheduling.requests import DecodeGroup, InFlight, Request
from helixbench.solver.scheduling.work import WorkItem


def prompt(request: int, num_tokens: int, *, past: int = 0, sample: bool = True) -> WorkItem:
    return WorkItem(request, past, num_tokens, sample=sample, is_decode=False)


def decode(request: int, past: int = 10) -> WorkItem:
    return WorkItem(request, past, 1, sample=True, is_decode=True)


def add(batcher: Batcher[Chunk], item: WorkItem, inputs: Any = None) -> None:
    """As a server's node does."""
    if item.is_decode:
        batcher.add_decodes(Chunk(item, inputs, 0))
    else:
        batcher.add_prompt(item, inputs)


def next_batch(batcher: Batcher[Chunk]) -> list[Chunk]:
    decodes, prompts = batcher.next_batch()
    return decodes + prompts


def run_all(batcher: Batcher[Chunk]) -> list[list[Chunk]]:
    batches = []
    while batcher.has_work:
        batches.append(next_batch(batcher))
    return batches


ARRIVALS = st.lists(
    st.one_of(st.just("run"), st.just("decode"), st.tuples(st.integers(1, 60), st.booleans())), max_size=60
)


@given(arrivals=ARRIVALS, limit=st.integers(1, 20), decode_limit=st.one_of(st.none(), st.integers(1, 25)))
def test_tokens_come_out_once_in_order_and_never_too_many(
    arrivals: list[str | tuple[int, bool]], limit: int, decode_limit: int | None
) -> None:
    batcher: Batcher[Chunk] = Batcher(max_batch_tokens=limit, max_decode_batch=decode_limit)
    added: list[WorkItem] = []
    batches: list[list[Chunk]] = []
    for number, arrival in enumerate(arrivals):
        if arrival == "run":
            if batcher.has_work:
                batches.append(next_batch(batcher))
        elif isinstance(arrival, str):
            added.append(decode(number))
            add(batcher, added[-1], f"inputs of {number}")
        else:
            added.append(prompt(number, arrival[0], past=3, sample=arrival[1]))
            add(batcher, added[-1], f"inputs of {number}")
    batches += run_all(batcher)

    chunks: dict[int, list[Chunk]] = defaultdict(list)
    for batch in batches:
        assert 0 < sum(chunk.item.num_tokens for chunk in batch) <= limit
        kinds = [chunk.item.is_decode for chunk in batch]
        assert sum(kinds) <= (decode_limit or limit)
        assert kinds == sorted(kinds, reverse=True), "a prompt ran before a decoding sequence"
        for chunk in batch:
            chunks[chunk.item.request].append(chunk)
    for item in added:
        own = chunks.pop(item.request)
        assert sum(chunk.item.num_tokens for chunk in own) == item.num_tokens
        at = 0
        for chunk in own:
            assert (chunk.offset, chunk.item.past) == (at, item.past + at)
            assert chunk.inputs == f"inputs of {item.request}"
            assert chunk.item.is_decode == item.is_decode
            at += chunk.item.num_tokens
        assert [chunk.item.sample for chunk in own] == [False] * (len(own) - 1) + [item.sample]
    assert not chunks


@given(
    arrivals=st.lists(st.one_of(st.just("run"), st.integers(1, 12)), max_size=30),
    limit=st.integers(1, 20),
    decode_limit=st.one_of(st.none(), st.integers(1, 8)),
)
def test_groups_are_batched_as_their_members_are(
    arrivals: list[str | int], limit: int, decode_limit: int | None
) -> None:
    """A group that does not fit is divided where single sequences would be."""
    singles: Batcher[Chunk] = Batcher(max_batch_tokens=limit, max_decode_batch=decode_limit)
    groups: Batcher[DecodeGroup] = Batcher(max_batch_tokens=limit, max_decode_batch=decode_limit)
    numbers = itertools.count()
    for arrival in [*arrivals, *["run"] * 40]:
        if isinstance(arrival, int):
            members = [
                InFlight(Request(number=next(numbers), prompt=(0,) * 5, max_tokens=9), pipeline=0, ends_at=9)
                for _ in range(arrival)
            ]
            groups.add_decodes(DecodeGroup(0, members, 5 * arrival))
            for member in members:
                add(singles, decode(member.request.number))
        elif singles.has_work:
            taken, _ = groups.next_batch()
            assert [member.request.number for group in taken for member in group.members] == [
                chunk.item.request for chunk in next_batch(singles)
            ]
            assert all(group.context_tokens == 5 * group.count for group in taken)
        assert groups.has_work == singles.has_work


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=10), limit=st.integers(1, 16))
def test_prompts_end_in_the_order_of_arrival_and_only_the_last_of_a_batch_is_cut(sizes: list[int], limit: int) -> None:
    batcher: Batcher[Chunk] = Batcher(max_batch_tokens=limit)
    for number, size in enumerate(sizes):
        add(batcher, prompt(number, size))

    batches = run_all(batcher)

    order = [chunk.item.request for batch in batches for chunk in batch]
    assert order == sorted(order)
    assert len(batches) == -(-sum(sizes) // limit), "a batch was not filled"


def test_decodes_take_their_room_first() -> None:
    batcher: Batcher[Chunk] = Batcher(max_batch_tokens=8)
    add(batcher, prompt(0, 20))
    for request in range(1, 7):
        add(batcher, decode(request))

    first, second = next_batch(batcher), next_batch(batcher)

    assert [(chunk.item.request, chunk.item.num_tokens) for chunk in first] == [(n, 1) for n in range(1, 7)] + [(0, 2)]
    assert [(chunk.item.request, chunk.item.num_tokens) for chunk in second] == [(0, 8)]


def test_more_decodes_than_a_batch_holds_wait_in_order() -> None:
    batcher: Batcher[Chunk] = Batcher(max_batch_tokens=3)
    for request in range(7):
        add(batcher, decode(request))

    assert [[chunk.item.request for chunk in batch] for batch in run_all(batcher)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_limit_on_decodes_leaves_the_rest_of_the_batch_to_prompts() -> None:
    batcher: Batcher[Chunk] = Batcher(max_batch_tokens=8, max_decode_batch=2)
    add(batcher, prompt(0, 9))
    for request in range(1, 6):
        add(batcher, decode(request))

    assert [[(chunk.item.request, chunk.item.num_tokens) for chunk in batch] for batch in run_all(batcher)] == [
        [(1, 1), (2, 1), (0, 6)],
        [(3, 1), (4, 1), (0, 3)],
        [(5, 1)],
    ]


@pytest.mark.parametrize(("limit", "decode_limit"), [(0, None), (-1, None), (4, 0)])
def test_a_batcher_without_room_is_refused(limit: int, decode_limit: int | None) -> None:
    with pytest.raises(ValueError, match=f"max_batch_tokens, max_decode_batch: need >= 1, got {limit}, {decode_limit}"):
        Batcher(max_batch_tokens=limit, max_decode_batch=decode_limit)
