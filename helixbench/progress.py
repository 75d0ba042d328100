"""Progress on stderr: live bars on a terminal, a plain line every ten seconds elsewhere (CI logs, files)."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

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
