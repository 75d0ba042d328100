"""A flood of one kind is one line a second."""

from __future__ import annotations

import logging

import pytest

from helixbench.reference_server.wire.seldom import Seldom


def test_a_kind_is_written_once_a_second_with_the_number_left_out(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    seldom = Seldom(logging.getLogger("flood"), clock=lambda: now)
    for number in range(4000):
        now = number / 1000
        seldom.say(logging.ERROR, "unreadable", f"frame {number}")
    assert [record.getMessage() for record in caplog.records] == [
        "frame 0",
        *(f"frame {at} (and 999 more of this kind since the last such line)" for at in (1000, 2000, 3000)),
    ]


def test_kinds_do_not_hide_each_other(caplog: pytest.LogCaptureFixture) -> None:
    seldom = Seldom(logging.getLogger("flood"), clock=lambda: 7.0)
    for kind in ("a", "b", "a"):
        seldom.say(logging.ERROR, kind, kind)
    assert [record.getMessage() for record in caplog.records] == ["a", "b"]
