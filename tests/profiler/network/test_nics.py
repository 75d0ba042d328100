from __future__ import annotations

from helixbench.profiler.network.nics import make_nic

ALONE = {("a", "b"): 100.0, ("a", "c"): 80.0, ("a", "d"): 100.0, ("b", "a"): 50.0}


def test_links_that_carry_less_together_share_a_nic() -> None:
    nic = make_nic("a", "out", ALONE, {("a", "b"): 35.0, ("a", "c"): 35.0, ("a", "d"): 35.0})
    assert nic is not None
    assert (nic.at_once_bytes_per_s, nic.alone_bytes_per_s, nic.best_bytes_per_s) == (105.0, 280.0, 100.0)
    assert nic.is_shared
    assert nic.limit_bytes_per_s() == 105.0
    assert nic.source() == "out: 3 links at once"


def test_links_that_carry_as_much_together_have_no_limit_in_common() -> None:
    nic = make_nic("a", "out", ALONE, {("a", "b"): 97.0, ("a", "c"): 78.0, ("a", "d"): 99.0})
    assert nic is not None
    assert nic.is_shared is False
    assert nic.limit_bytes_per_s() is None
    assert nic.limit_bytes_per_s(is_limited=True) is None, "the links bind first"
    assert nic.source() == ""


def test_a_nic_carries_at_least_its_best_link() -> None:
    nic = make_nic("a", "out", ALONE, {("a", "b"): 30.0, ("a", "c"): 30.0, ("a", "d"): 30.0})
    assert nic is not None
    assert nic.limit_bytes_per_s() == 100.0
    assert nic.source() == "out: best of 3 links alone, more than all at once"


def test_one_link_cannot_tell_but_stands_for_a_nic_that_is_known_to_be_limited() -> None:
    nic = make_nic("a", "in", ALONE, {("b", "a"): 50.0}, problem="it has one link")
    assert nic is not None
    assert nic.is_shared is None
    assert nic.limit_bytes_per_s() is None
    assert nic.limit_bytes_per_s(is_limited=True) == 50.0
    assert nic.source(is_limited=True) == "in: best of 1 links alone (all at once: it has one link)"


def test_links_of_other_nodes_and_the_other_direction_do_not_count() -> None:
    nic = make_nic("a", "out", ALONE, {("a", "b"): 60.0, ("a", "c"): 60.0, ("b", "a"): 1e9, ("b", "c"): 1e9})
    assert nic is not None
    assert (nic.num_links, nic.at_once_bytes_per_s, nic.alone_bytes_per_s) == (2, 120.0, 180.0)
    assert make_nic("d", "out", ALONE, {}) is None
