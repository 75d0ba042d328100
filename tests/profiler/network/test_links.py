from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixbench.profiler.cluster import MessageTime
from helixbench.profiler.network.links import AGREES_WITHIN, agreed_bytes_per_s, disagreement, rough_bytes_per_s


@pytest.mark.parametrize(
    ("rates", "agreed"),
    [
        ([], None),
        ([100.0], None),
        ([100.0, 60.0], None),
        ([100.0, 91.0], 95.5),
        ([100.0, 60.0, 98.0], 99.0),
        ([100.0, 80.0, 60.0], None),
        ([100.0, 92.0, 93.0], 92.5),
    ],
)
def test_the_two_closest_attempts_make_the_rate_where_they_agree(rates: list[float], agreed: float | None) -> None:
    assert agreed_bytes_per_s(rates) == agreed


@given(st.lists(st.floats(1.0, 1e12), min_size=2, max_size=6))
def test_an_agreed_rate_has_two_attempts_near_it(rates: list[float]) -> None:
    agreed = agreed_bytes_per_s(rates)

    near = [rate for rate in rates if agreed is not None and abs(rate - agreed) <= 0.5001 * AGREES_WITHIN * agreed]
    assert agreed is None or len(near) >= 2


def test_a_disagreement_names_the_rates_and_the_last_error() -> None:
    assert disagreement([1e7, 5e6], []) == "attempts differ: 80, 40 Mbit/s"
    assert disagreement([], ["refused", "reset"]) == "2 of 2 attempts failed: reset"
    assert disagreement([1e7], ["reset"]) == "attempts differ: 80 Mbit/s; 1 of 2 attempts failed: reset"
    assert disagreement([], []) == ""


def test_the_largest_message_gives_a_rough_rate() -> None:
    assert rough_bytes_per_s((MessageTime(2000, 0.01), MessageTime(10, 0.001))) == 2e5
    assert rough_bytes_per_s(()) is None
