"""Ctrl-C as a question that long work asks between its steps, so that it can keep what it has."""

from __future__ import annotations

import signal
from types import FrameType

EXIT_CODE = 130  # of an interrupted command, as a shell has it


class Interrupted:
    """Called, it tells whether SIGINT or SIGTERM came since it was made; a second one raises ``KeyboardInterrupt``."""

    def __init__(self) -> None:
        self._came = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def __call__(self) -> bool:
        """Whether one came."""
        return self._came

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - signature of signal handlers
        if self._came:
            raise KeyboardInterrupt
        self._came = True
