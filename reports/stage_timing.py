"""Time on the device, not of the launch: a timer for pytest-benchmark that reads CUDA events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# About 10 ms at the clock of a data-centre GPU: long enough for the host to queue what is timed behind it, so that the
# device never waits for a launch between the two events.
HEAD_START_CYCLES = 20_000_000


class EventMark:
    """A point in a stream's work; the difference of two marks is the seconds that the device took between them."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def __sub__(self, earlier: EventMark) -> float:
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def device_timer(device: str) -> Callable[[], EventMark]:
    """A timer for pytest-benchmark, which calls it before and after each round and subtracts.

    Every first call of two lets the device spin for a while and then records its event: the launches of the round are
    queued meanwhile.
    """
    import torch

    cuda: Any = torch.cuda
    is_end = False

    def cuda_event_time() -> EventMark:
        nonlocal is_end
        with cuda.device(device):
            if not is_end:
                cuda._sleep(HEAD_START_CYCLES)  # PyTorch's own tests and benchmarks use it so; there is no public one
            event = cuda.Event(enable_timing=True)
            event.record()
        is_end = not is_end
        return EventMark(event)

    return cuda_event_time
