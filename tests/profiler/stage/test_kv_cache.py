from __future__ import annotations

import itertools
import sys
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helixbench.profiler.measure.memory import workspace_bytes
from helixbench.profiler.stage import kv_cache
from helixbench.profiler.stage.kv_cache import KvCache

CAPACITY = 40
Operation = tuple[Literal["reserve", "release"], int]  # (what, a number that picks the length or the request)


def make_cache(capacity_tokens: int = CAPACITY) -> KvCache:
    return KvCache(
        num_layers=2,
        num_kv_heads=3,
        head_dim=2,
        capacity_tokens=capacity_tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def slots(cache: KvCache, request: int) -> torch.Tensor:
    extent = cache.extent(request)
    return cache.arena[:, :, :, extent.offset : extent.offset + extent.length]


def mark(cache: KvCache, request: int) -> torch.Tensor:
    """Write what only this request could have written, different in every place; returns a copy of it."""
    own = slots(cache, request)
    own.copy_(request * 10_000 + torch.arange(own.numel(), dtype=torch.float32).view(own.shape))
    return own.clone()


def check_extents(cache: KvCache, held: dict[int, torch.Tensor]) -> None:
    extents = sorted((cache.extent(request) for request in held), key=lambda e: e.offset)
    for before, after in itertools.pairwise(extents):
        assert before.offset + before.length <= after.offset, "two requests share slots"
    assert all(e.offset + e.length <= cache.capacity_tokens for e in extents)
    assert cache.used_tokens == sum(e.length for e in extents)
    for request, written in held.items():
        assert torch.equal(slots(cache, request), written), "data did not move with its request"


OPERATIONS = st.lists(st.tuples(st.sampled_from(("reserve", "reserve", "release")), st.integers(0, 1000)), max_size=60)


@given(operations=OPERATIONS)
def test_whatever_the_order_free_slots_can_be_used_and_data_stays(operations: list[Operation]) -> None:
    cache = make_cache()
    held: dict[int, torch.Tensor] = {}  # request -> what it wrote
    peak = 0
    for number, (what, pick) in enumerate(operations):
        free = CAPACITY - cache.used_tokens
        if what == "release" and held:
            request = sorted(held)[pick % len(held)]
            cache.release(request)
            del held[request]
        elif what == "reserve" and free:
            length = 1 + pick % free
            assert cache.reserve(number, length).length == length
            held[number] = mark(cache, number)
        peak = max(peak, cache.used_tokens)
        check_extents(cache, held)
    assert cache.peak_tokens == peak


def test_slots_between_two_requests_are_found_without_moving_them() -> None:
    cache = make_cache()
    for request, length in enumerate((10, 5, 25)):
        cache.reserve(request, length)
    cache.release(1)
    assert cache.reserve(3, 5).offset == 10
    assert cache.extent(2).offset == 15


def test_holes_are_packed_together_when_none_is_long_enough() -> None:
    cache = make_cache()
    for request in range(8):
        cache.reserve(request, 5)
    written = {request: mark(cache, request) for request in (1, 3, 5, 7)}
    for request in (0, 2, 4, 6):
        cache.release(request)

    extent = cache.reserve(8, 20)

    assert (extent.offset, extent.length) == (20, 20)
    check_extents(cache, written | {8: slots(cache, 8).clone()})


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 100])
def test_what_is_moved_in_pieces_arrives_whole(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "MAX_GATHERED_SLOTS", piece)
    cache = make_cache()
    cache.reserve(0, 3)
    cache.reserve(1, 17)
    cache.reserve(2, 2)
    cache.reserve(3, 11)
    written = {request: mark(cache, request) for request in (1, 3)}
    cache.release(0)
    cache.release(2)

    cache.reserve(4, 12)

    assert [cache.extent(request).offset for request in (1, 3, 4)] == [0, 17, 28]
    check_extents(cache, written | {4: slots(cache, 4).clone()})


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_packing_needs_no_room_for_a_request_over_all_layers() -> None:
    layers, length, layer_bytes = 16, 4000, 2 * 4000 * 64 * 4
    cpu = torch.device("cpu")
    cache = KvCache(
        num_layers=layers, num_kv_heads=1, head_dim=64, capacity_tokens=2 * length, dtype=torch.float32, device=cpu
    )
    cache.arena.fill_(1.0)
    cache.reserve(0, length // 2)
    cache.reserve(1, length)
    cache.release(0)

    assert workspace_bytes(lambda: cache.reserve(2, length), device=cpu) < 4 * layer_bytes
    assert cache.extent(1).offset == 0, "it was moved"


@given(held=st.lists(st.integers(1, 15), max_size=6), more=st.integers(1, 10))
def test_more_than_is_free_is_refused_and_changes_nothing(held: list[int], more: int) -> None:
    cache = make_cache(capacity_tokens=sum(held) + 3)
    written = {}
    for request, length in enumerate(held):
        cache.reserve(request, length)
        written[request] = mark(cache, request)

    with pytest.raises(ValueError, match=rf"request 99 wants {3 + more} KV slots; 3 of {sum(held) + 3} are free"):
        cache.reserve(99, 3 + more)

    check_extents(cache, written)
    with pytest.raises(KeyError):
        cache.extent(99)
    cache.reserve(99, 3)


@pytest.mark.parametrize("length", [0, -1])
def test_a_request_needs_at_least_one_slot(length: int) -> None:
    with pytest.raises(ValueError, match=f"wants {length} KV slots"):
        make_cache().reserve(0, length)


def test_a_request_reserves_once_and_releases_once() -> None:
    cache = make_cache()
    cache.reserve(1, 4)
    with pytest.raises(ValueError, match="request 1 has KV slots already"):
        cache.reserve(1, 4)
    cache.release(1)
    with pytest.raises(KeyError):
        cache.release(1)
    assert cache.used_tokens == 0


def test_a_cache_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity_tokens: need >= 1"):
        make_cache(capacity_tokens=0)
