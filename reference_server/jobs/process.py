"""Signals, errors and exit codes of the process that does a job as the coordinator."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType

from helixbench.errors import HelixbenchError
from helixbench.progress import Reporter

INTERRUPTED = 130


class Interrupted:
    """Whether SIGINT or SIGTERM came since this was made; a second one raises ``KeyboardInterrupt``."""

    def __init__(self) -> None:
        self.is_set = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - signature of signal handlers
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


def do_job(work: Callable[[Reporter], object]) -> int:
    """Do the work with its progress shown and return the exit code; an error is one message on stderr."""
    try:
        with Reporter() as reporter:
            work(reporter)
    except HelixbenchError as error:
        print(f"helixbench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("helixbench: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    return 0
