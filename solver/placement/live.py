"""Progress of a search on stderr: one live line on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from helixbench.solver.placement.progress import OnProgress, Progress

REFRESHES_PER_SECOND = 4


@contextmanager
def shown_progress() -> Iterator[OnProgress]:
    """What to call as a search goes; on a terminal its line goes away at the end."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Printed().say
        return
    line = LiveLine(time.perf_counter)
    with Live(get_renderable=line.text, console=console, refresh_per_second=REFRESHES_PER_SECOND, transient=True):
        yield line.say


class LiveLine:
    """The latest moment as one line; seconds go on between two moments, for a program may be silent for long."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._latest: Progress | None = None

    def say(self, moment: Progress) -> None:
        """Show this moment from now on."""
        self._latest = moment

    def text(self) -> str:
        """The line as it is now."""
        known = "starting" if self._latest is None else in_words(self._latest)
        return f"{self._clock() - self._began:6.1f} s  {known}"


class Printed:
    """A line for each moment that says something new."""

    def __init__(self) -> None:
        self._last = ""

    def say(self, moment: Progress) -> None:
        """Print the moment unless the line before said the same."""
        known = in_words(moment)
        if known != self._last:
            self._last = known
            print(f"{moment.seconds:6.1f} s  {known}", file=sys.stderr, flush=True)


def in_words(moment: Progress) -> str:
    """What is expected where that is searched for, max-flow, bound, gap and what is being done."""
    expected = "" if moment.expected_tokens_per_s is None else f"expected {moment.expected_tokens_per_s:.1f}  "
    best = "none yet" if moment.incumbent_tokens_per_s is None else f"{moment.incumbent_tokens_per_s:.1f}"
    gap = "" if moment.gap is None else f"  gap {moment.gap:.2%}"
    return f"{expected}max-flow {best}  bound {moment.bound_tokens_per_s:.1f} tokens/s{gap}  {moment.doing}"
