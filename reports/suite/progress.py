"""Progress of a suite on stderr: a line for every step, what runs now on a terminal, and how long it will take."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status


class Progress:
    """Knows ``left``, the number of steps of each kind that are to come. Use as a context manager."""

    def __init__(self, left: Mapping[str, int]) -> None:
        self._left = dict(left)
        self._total = sum(left.values())
        self._took_s: dict[str, list[float]] = {}  # kind -> seconds of its steps that ran
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
        """A step while it runs."""
        heading = self._heading(kind, title)
        if self._status is not None:
            self._status.update(f"{heading}{self.time_left()}")
        began_s = time.perf_counter()
        try:
            yield
        finally:
            took_s = time.perf_counter() - began_s
            self._took_s.setdefault(kind, []).append(took_s)
            self._line(f"{heading}: {took_s:.1f} s{self.time_left()}")

    def skip(self, kind: str, title: str = "") -> None:
        """A step whose result is there already, or (without a title) cannot be had."""
        heading = self._heading(kind, title)
        if title:
            self._line(f"{heading}: kept")

    def say(self, text: str) -> None:
        """A line about the step that has just ended."""
        self._line(f"    {text}")

    def time_left(self) -> str:
        """How long the steps to come will take, by those of their kind that ran; empty before any did."""
        known = {kind: count for kind, count in self._left.items() if count and kind in self._took_s}
        seconds = sum(count * statistics.median(self._took_s[kind]) for kind, count in known.items())
        if seconds < 1:
            return ""
        more = " at least" if any(count and kind not in known for kind, count in self._left.items()) else ""
        return f", {seconds / 60:.1f} min left{more}"

    def _heading(self, kind: str, title: str) -> str:
        self._left[kind] -= 1
        return f"[{self._total - sum(self._left.values())}/{self._total}] {title}"

    def _line(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)
