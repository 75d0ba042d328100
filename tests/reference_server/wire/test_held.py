from __future__ import annotations

from helixbench.reference_server.wire.held import HeldMessages, due_s


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_messages_come_out_when_they_are_due_in_that_order() -> None:
    clock = Clock()
    held: HeldMessages[str] = HeldMessages(clock)
    for message, due in (("late", 103.0), ("first", 101.0), ("second", 101.0)):
        held.add(message, due_s=due)

    assert held.take() == []
    clock.now_s = 101.0
    assert held.take() == ["first", "second"]
    clock.now_s = 104.0
    assert held.take() == ["late"]
    assert held.take() == []


def test_nobody_waits_beyond_the_next_message_that_is_due() -> None:
    clock = Clock()
    held: HeldMessages[str] = HeldMessages(clock)
    assert held.poll_ms(1000) == 1000
    held.add("a", due_s=100.0505)
    assert held.poll_ms(1000) == 51, "rounded up: not asked again before it is due"
    assert held.poll_ms(10) == 10
    clock.now_s = 101.0
    assert held.poll_ms(1000) == 0


def test_without_latency_a_message_is_due_at_once() -> None:
    assert due_s(0.0) == 0.0
