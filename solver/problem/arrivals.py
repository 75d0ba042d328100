"""Arrivals: when requests come, simulated or served. The same seed gives the same requests."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import msgspec

from helixbench.errors import InputError
from helixbench.solver.problem.traces import Trace, TracedRequest
from helixbench.solver.problem.workload import Workload, draw_lengths

ArrivalKind = Literal["closed loop", "offline", "poisson", "gamma", "replay"]

TimedRequest: TypeAlias = tuple[float, int, int]
"""Seconds since the run began, prompt tokens, output tokens."""


class Arrivals(msgspec.Struct, frozen=True, kw_only=True):
    """When requests arrive.

    ``closed loop``: a fixed number in flight, each followed by the next when it ends. ``offline``: all at the start.
    ``poisson`` and ``gamma``: ``rate_per_s`` on average, with gaps drawn from a gamma distribution of shape
    ``burstiness`` (1 is Poisson, below 1 bursty). ``replay``: at the times and with the lengths of a trace, ``speedup``
    times as fast.
    """

    kind: ArrivalKind
    rate_per_s: float | None = None
    burstiness: float = 1.0
    speedup: float = 1.0

    def __post_init__(self) -> None:
        if (self.rate_per_s is not None) != (self.kind in ("poisson", "gamma")):
            raise ValueError("rate_per_s: needed for poisson and gamma arrivals, and only there")
        if self.rate_per_s is not None and not 0 < self.rate_per_s < float("inf"):
            raise ValueError(f"rate_per_s: need more than 0, got {self.rate_per_s}")
        if not 0 < self.burstiness < float("inf"):
            raise ValueError(f"burstiness: need more than 0, got {self.burstiness}")
        if not 0 < self.speedup < float("inf"):
            raise ValueError(f"speedup: need more than 0, got {self.speedup}")

    @property
    def is_open_loop(self) -> bool:
        """Whether requests come at times of their own, whatever becomes of others."""
        return self.kind in ("poisson", "gamma", "replay")

    def __str__(self) -> str:
        if self.kind == "poisson":
            return f"poisson, {self.rate_per_s:g} requests/s"
        if self.kind == "gamma":
            return f"gamma, {self.rate_per_s:g} requests/s, burstiness {self.burstiness:g}"
        if self.speedup != 1:
            return f"{self.kind}, {self.speedup:g} times as fast"
        return self.kind


def arrivals_of_options(
    *, offline: bool = False, rate: float | None, burstiness: float, replay: bool, speedup: float, trace: Trace | None
) -> Arrivals:
    """The arrivals that the command-line options describe; a closed loop where none of them is given.

    Raises:
        InputError: options that exclude each other, or a replay without arrival times.
    """
    if sum((offline, rate is not None, replay)) > 1:
        raise InputError("--offline, --rate, --replay: give one of them at most; without one it is a closed loop")
    if burstiness != 1 and rate is None:
        raise InputError("--burstiness: goes with --rate")
    if speedup != 1 and not replay:
        raise InputError("--speedup: goes with --replay")
    if replay and trace is None:
        raise InputError("--replay: needs --trace, which has the arrival times")
    if replay and trace is not None and not trace.has_arrivals:
        raise InputError(f"--replay: {trace.source} says not when requests arrived; give --rate")
    try:
        if rate is not None:
            return Arrivals(kind="poisson" if burstiness == 1 else "gamma", rate_per_s=rate, burstiness=burstiness)
        return Arrivals(kind="offline" if offline else "replay" if replay else "closed loop", speedup=speedup)
    except ValueError as error:
        raise InputError(f"--rate, --burstiness, --speedup: {error}") from error


def draw_times(arrivals: Arrivals, rng: random.Random) -> Iterator[float]:
    """Arrival times in seconds, without end."""
    assert arrivals.rate_per_s is not None
    at_s = 0.0
    shape = arrivals.burstiness
    while True:
        at_s += rng.gammavariate(shape, 1 / (arrivals.rate_per_s * shape))
        yield at_s


def timed_requests(
    arrivals: Arrivals, workload: Workload, *, trace: Sequence[TracedRequest] = (), seed: int = 0
) -> Iterator[TimedRequest]:
    """The requests of an open loop, in the order of their arrival; none of other arrivals."""
    if arrivals.kind == "replay":
        for request in trace:
            yield request.arrival_s / arrivals.speedup, request.prompt_tokens, request.output_tokens
    elif arrivals.rate_per_s is not None:
        lengths = draw_lengths(workload, random.Random(seed))
        for at_s in draw_times(arrivals, random.Random(f"arrivals {seed}")):
            prompt_tokens, output_tokens = next(lengths)
            yield at_s, prompt_tokens, output_tokens
