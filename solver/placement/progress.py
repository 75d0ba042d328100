"""Progress of a search, shown on stderr: one live line on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

REFRESHES_PER_SECOND = 4


@dataclass(frozen=True)
class Progress:
    """A moment of a search: best max-flow so far (``None`` before the first plan) and the proven bound, tokens/s.

    ``expected_tokens_per_s`` is the best plan's expected throughput where that is the objective: then its max-flow may
    well fall while the plan gets better.
    """

    seconds: float
    incumbent_tokens_per_s: float | None
    bound_tokens_per_s: float
    doing: str
    expected_tokens_per_s: float | None = None

    @property
    def gap(self) -> float | None:
        """``(bound - incumbent) / incumbent``; ``None`` before the first plan."""
        if not self.incumbent_tokens_per_s:
            return None
        return max(0.0, self.bound_tokens_per_s - self.incumbent_tokens_per_s) / self.incumbent_tokens_per_s

    def __str__(self) -> str:
        expected = "" if self.expected_tokens_per_s is None else f"expected {self.expected_tokens_per_s:.1f}  "
        best = "none yet" if self.incumbent_tokens_per_s is None else f"{self.incumbent_tokens_per_s:.1f}"
        gap = "" if self.gap is None else f"  gap {self.gap:.2%}"
        return f"{expected}max-flow {best}  bound {self.bound_tokens_per_s:.1f} tokens/s{gap}  {self.doing}"


OnProgress = Callable[[Progress], None]


@contextmanager
def shown_progress() -> Iterator[OnProgress]:
    """A function to call with each moment of a search; on a terminal its line disappears at the end."""
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
    """The latest moment as one line; its clock runs on between two moments, for HiGHS may be silent for long."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._latest: Progress | None = None

    def say(self, moment: Progress) -> None:
        """Show this moment from now on."""
        self._latest = moment

    def text(self) -> str:
        """The line as it is now."""
        return f"{self._clock() - self._began:6.1f} s  {self._latest or 'starting'}"


class Printed:
    """A line for each moment whose text differs from the last one."""

    def __init__(self) -> None:
        self._last = ""

    def say(self, moment: Progress) -> None:
        """Print the moment unless the last line has the same text."""
        if str(moment) != self._last:
            self._last = str(moment)
            print(f"{moment.seconds:6.1f} s  {moment}", file=sys.stderr, flush=True)
