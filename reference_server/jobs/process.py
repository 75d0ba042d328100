"""What every process that does a job as the coordinator has in common: signals, errors, exit codes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType

from helixbench.errors import HelixbenchError
from helixbench.progress import Reporter

INTERRUPTED = 130


class Interrupted:
    """Whether SIGINT or SIGTERM came since this was made; a second one ends the job at once.

    ``on_first`` is called when the first one comes.
    """

    def __init__(self, on_first: Callable[[], None] = lambda: None) -> None:
        self.is_set = False
        self._on_first = on_first
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - as signal handlers are called
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        self._on_first()


def do_job(work: Callable[[Reporter], object]) -> int:
    """Do it with its progress shown; the exit code. An error is one message on stderr."""
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
