"""Log lines about what others send: one per kind and second, so that a flood of bad messages does not fill a disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_EVERY_S = 1.0


class Seldom:
    """Writes to a log what is new about a kind of event at most once a second, and how many more there were.

    Args:
        log: where to.
        clock: seconds, never going back.
    """

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._said_s: dict[str, float] = {}  # kind -> when a line was last written
        self._num_left_out: dict[str, int] = {}  # kind -> events since then

    def say(self, level: int, kind: str, text: str, *, exc_info: bool = False) -> None:
        """Write a line, or count it. ``kind`` is one of few: each is remembered."""
        now_s = self._clock()
        if now_s - self._said_s.get(kind, now_s - _EVERY_S) < _EVERY_S:
            self._num_left_out[kind] = self._num_left_out.get(kind, 0) + 1
            return
        self._said_s[kind] = now_s
        left_out = self._num_left_out.pop(kind, 0)
        more = f" (and {left_out} more of this kind since the last such line)" if left_out else ""
        self._log.log(level, "%s%s", text, more, exc_info=exc_info)
