"""Arrivals: when requests come. The same seed gives the same requests."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec

from helixbench.errors import InputError

ArrivalKind = Literal["closed loop", "offline", "poisson", "gamma", "replay"]


class Arrivals(msgspec.Struct, frozen=True, kw_only=True):
    """When requests arrive.

    ``closed loop``: a fixed number in flight, each followed by the next when it ends. ``offline``: all at the start.
    ``poisson`` and ``gamma``: ``rate_per_s`` on average, with gaps drawn from a gamma distribution of shape
    ``burstiness`` (1 is Poisson, below 1 bursty). ``replay``: at the times and with the lengths of a trace.
    """

    kind: ArrivalKind
    rate_per_s: float | None = None
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        if (self.rate_per_s is not None) != (self.kind in ("poisson", "gamma")):
            raise ValueError("rate_per_s: needed for poisson and gamma arrivals, and only there")
        if self.rate_per_s is not None and not 0 < self.rate_per_s < float("inf"):
            raise ValueError(f"rate_per_s: need more than 0, got {self.rate_per_s}")
        if not 0 < self.burstiness < float("inf"):
            raise ValueError(f"burstiness: need more than 0, got {self.burstiness}")

    def __str__(self) -> str:
        if self.kind == "poisson":
            return f"poisson, {self.rate_per_s:g} requests/s"
        if self.kind == "gamma":
            return f"gamma, {self.rate_per_s:g} requests/s, burstiness {self.burstiness:g}"
        return self.kind


class TracedRequest(msgspec.Struct, frozen=True, array_like=True):
    """A request of a trace: seconds since the trace's first one, and its lengths."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def draw_times(arrivals: Arrivals, rng: random.Random) -> Iterator[float]:
    """Arrival times in seconds, without end."""
    assert arrivals.rate_per_s is not None
    at_s = 0.0
    shape = arrivals.burstiness
    while True:
        at_s += rng.gammavariate(shape, 1 / (arrivals.rate_per_s * shape))
        yield at_s


def read_trace(path: Path) -> tuple[TracedRequest, ...]:
    """Requests of a CSV with the columns ``TIMESTAMP``, ``ContextTokens`` and ``GeneratedTokens``, by time.

    Raises:
        InputError: not such a file, or no request in it.
    """
    rows: list[tuple[float, int, int]] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} - set(reader.fieldnames or ())
            if missing:
                raise InputError(
                    f"{path}: no column {', '.join(sorted(missing))}; need TIMESTAMP, ContextTokens, GeneratedTokens"
                )
            rows += [_traced(row, origin=f"{path}:{reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV trace ({error})") from error
    if not rows:
        raise InputError(f"{path}: no requests in it")
    rows.sort(key=lambda row: row[0])
    first_s = rows[0][0]
    return tuple(TracedRequest(at_s - first_s, prompt, output) for at_s, prompt, output in rows)


def _traced(row: dict[str, str], *, origin: str) -> tuple[float, int, int]:
    try:
        whole, _, fraction = (row["TIMESTAMP"] or "").partition(".")  # None where the row is short
        at_s = datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")
        prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
    except (TypeError, ValueError) as error:
        raise InputError(f"{origin}: need a time (2023-11-16 18:15:46.68) and two whole numbers ({error})") from error
    return at_s, max(1, prompt), max(1, output)
