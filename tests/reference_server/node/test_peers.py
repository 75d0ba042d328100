from __future__ import annotations

import pytest

from helixbench.reference_server.node.peers import SLOWEST_SHARE, Silence


def test_a_peer_that_is_asked_and_says_nothing_is_silent_from_then_on() -> None:
    silence = Silence(1000.0, now_s=0.0)
    assert silence.seconds(5.0) == 0, "nothing was asked"

    silence.asked(5.0)

    assert silence.seconds(8.0) == pytest.approx(3.0)
    silence.answered(8.0)
    assert silence.seconds(9.0) == 0


def test_work_ahead_of_a_question_on_a_slow_link_is_no_silence() -> None:
    silence = Silence(1000.0, now_s=0.0)
    silence.sent(9000)
    silence.asked(0.0)
    through_s = 9.0 / SLOWEST_SHARE

    assert silence.seconds(through_s) == 0
    assert silence.seconds(through_s + 2.5) == pytest.approx(2.5)


def test_what_has_arrived_excuses_nothing_any_more() -> None:
    silence = Silence(1000.0, now_s=0.0)
    silence.sent(9000)
    silence.asked(0.0)
    silence.asked(0.5)
    silence.answered(9.0)

    assert silence.seconds(11.5) == pytest.approx(2.5), "the second question stood right behind the first"


def test_on_a_link_of_unknown_rate_work_takes_no_time() -> None:
    silence = Silence(None, now_s=0.0)
    silence.sent(10**9)
    silence.asked(0.0)

    assert silence.seconds(2.5) == pytest.approx(2.5)
