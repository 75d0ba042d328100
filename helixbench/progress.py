"""Progress on stderr: live bars on a terminal, a plain line every ten seconds elsewhere (CI logs, files)."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.status import Status

_PLAIN_EVERY_S = 10.0


class Reporter:
    """One bar per name. Use as a context manager; ``update`` is cheap to call often.

    Args:
        auto_refresh: redraw in a thread. Without it bars are drawn by ``update`` alone, so that none is drawn while
            something is timed.
    """

    def __init__(self, *, auto_refresh: bool = True) -> None:
        self._console = Console(file=sys.stderr)
        columns = (TextColumn("  {task.description:<24}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._bars = Progress(
            *columns,
            TimeElapsedColumn(),
            console=self._console,
            auto_refresh=auto_refresh,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}  # name -> its bar
        self._finished: set[str] = set()
        self._last_line: dict[str, float] = {}  # name -> time of its last plain line

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self, name: str, done: float, total: float) -> None:
        """Show ``done`` of ``total`` for that name; a total of 0 is complete."""
        if not self._bars.disable:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name)
            self._bars.update(self._tasks[name], completed=done, total=total, refresh=not self._bars.live.auto_refresh)
            return
        now = time.monotonic()
        is_news = done >= total and name not in self._finished
        self._finished |= {name} if is_news else set()
        if is_news or now - self._last_line.get(name, 0.0) >= _PLAIN_EVERY_S:
            self._last_line[name] = now
            share = done / total if total else 1.0
            self._console.print(f"  {name}: {100 * share:.0f} %", highlight=False)

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(f"  {line}", highlight=False, soft_wrap=True)


class StepReporter:
    """A line per step of a long job, the running step on a terminal, and an estimate of the time left.

    Use as a context manager. ``left`` maps each kind of step to the number of steps to come.
    """

    def __init__(self, left: Mapping[str, int]) -> None:
        self._left = dict(left)
        self._total = sum(left.values())
        self._took_s: dict[str, list[float]] = {}  # kind -> durations of the steps that ran
        self._console = Console(file=sys.stderr, highlight=False)
        self._status = Status("", console=self._console) if self._console.is_terminal else None

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    @contextmanager
    def step(self, kind: str, title: str) -> Iterator[None]:
        """Time a step while it runs."""
        heading = self._heading(kind, title)
        if self._status is not None:
            self._status.update(f"{heading}{self.time_left()}")
        began_s = time.perf_counter()
        try:
            yield
        finally:
            took_s = time.perf_counter() - began_s
            self._took_s.setdefault(kind, []).append(took_s)
            self.say(f"{heading}: {took_s:.1f} s{self.time_left()}")

    def keep(self, kind: str, title: str) -> None:
        """Count a step whose result exists already."""
        self.say(f"{self._heading(kind, title)}: kept")

    def skip(self, kind: str) -> None:
        """Count a step that cannot run."""
        self._left[kind] -= 1

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(line, markup=False, soft_wrap=True)

    def time_left(self) -> str:
        """Time that the remaining steps take, from the median of their kind; empty before any is known."""
        known = {kind: count for kind, count in self._left.items() if count and kind in self._took_s}
        seconds = sum(count * statistics.median(self._took_s[kind]) for kind, count in known.items())
        if seconds < 1:
            return ""
        more = " at least" if any(count and kind not in known for kind, count in self._left.items()) else ""
        return f", {seconds / 60:.1f} min left{more}"

    def _heading(self, kind: str, title: str) -> str:
        self._left[kind] -= 1
        return f"[{self._total - sum(self._left.values())}/{self._total}] {title}"
