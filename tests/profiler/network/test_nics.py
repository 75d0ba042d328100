from __future__ import annotations

from helixbench.profiler.network.nics import make_card

ALONE = {("a", "b"): 100.0, ("a", "c"): 80.0, ("a", "d"): 100.0, ("b", "a"): 50.0}


def test_links_that_carry_less_together_share_a_card() -> None:
    card = make_card("a", "out", ALONE, {("a", "b"): 35.0, ("a", "c"): 35.0, ("a", "d"): 35.0})
    assert card is not None
    assert (card.at_once_bytes_per_s, card.alone_bytes_per_s, card.best_bytes_per_s) == (105.0, 280.0, 100.0)
    assert card.is_shared
    assert card.limit_bytes_per_s() == 105.0
    assert card.source() == "out: 3 links at once"


def test_links_that_carry_as_much_together_have_no_limit_in_common() -> None:
    card = make_card("a", "out", ALONE, {("a", "b"): 97.0, ("a", "c"): 78.0, ("a", "d"): 99.0})
    assert card is not None
    assert card.is_shared is False
    assert card.limit_bytes_per_s() is None
    assert card.limit_bytes_per_s(is_limited=True) is None, "the links bind first"
    assert card.source() == ""


def test_a_card_carries_at_least_its_best_link() -> None:
    card = make_card("a", "out", ALONE, {("a", "b"): 30.0, ("a", "c"): 30.0, ("a", "d"): 30.0})
    assert card is not None
    assert card.limit_bytes_per_s() == 100.0
    assert card.source() == "out: best of 3 links alone, more than all at once"


def test_one_link_cannot_tell_but_stands_for_a_card_that_is_known_to_be_limited() -> None:
    card = make_card("a", "in", ALONE, {("b", "a"): 50.0}, problem="it has one link")
    assert card is not None
    assert card.is_shared is None
    assert card.limit_bytes_per_s() is None
    assert card.limit_bytes_per_s(is_limited=True) == 50.0
    assert card.source(is_limited=True) == "in: best of 1 links alone (all at once: it has one link)"


def test_links_of_other_nodes_and_the_other_direction_do_not_count() -> None:
    card = make_card("a", "out", ALONE, {("a", "b"): 60.0, ("a", "c"): 60.0, ("b", "a"): 1e9, ("b", "c"): 1e9})
    assert card is not None
    assert (card.num_links, card.at_once_bytes_per_s, card.alone_bytes_per_s) == (2, 120.0, 180.0)
    assert make_card("d", "out", ALONE, {}) is None
