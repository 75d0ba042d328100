"""Event loop: a virtual clock and a queue of actions, in an order that is defined down to the last tie."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

# Order of actions at one moment. A node begins an iteration only when all that reaches it by then has reached it.
MARK, FAULT, WIRE, ARRIVAL, COORDINATOR, ITERATION_END, ITERATION_BEGIN = range(7)

_Entry: TypeAlias = tuple[float, int, int, Callable[[Any], None], Any]


class EventLoop:
    """Runs actions in the order of (time, priority, order of scheduling); nothing else decides between two of them."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_events = 0
        self._queue: list[_Entry] = []
        self._scheduled = 0
        self._is_stopped = False

    def at(self, when_s: float, priority: int, action: Callable[[Any], None], argument: Any = None) -> None:
        """Schedule ``action(argument)`` at ``when_s``, which is not before now."""
        assert when_s >= self.now_s, f"{action} at {when_s} s, before now ({self.now_s} s)"
        self._scheduled += 1
        heapq.heappush(self._queue, (when_s, priority, self._scheduled, action, argument))

    @property
    def arguments(self) -> Iterator[Any]:
        """Arguments of the actions that are scheduled."""
        return (argument for *_, argument in self._queue)

    def stop(self) -> None:
        """End ``run`` after the present action; the queue stays as it is."""
        self._is_stopped = True

    def run(self, max_events: int) -> bool:
        """Run at most this many actions; ``False`` where it was stopped or the queue is empty."""
        queue, pop = self._queue, heapq.heappop
        self._is_stopped = False
        for _ in range(max_events):
            if not queue:
                return False
            self.now_s, _, _, action, argument = pop(queue)
            self.num_events += 1
            action(argument)
            if self._is_stopped:
                return False
        return True
