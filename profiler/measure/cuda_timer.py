"""CUDA events around each iteration: what the device took, beside what the wall clock says."""

from __future__ import annotations

from typing import Any

import torch


class CudaTimer:
    """A ``DeviceTimer``: what runs within ``with timer:`` counts.

    Events are recorded on the current stream; nothing waits until the total is asked for.

    Args:
        device: whose stream.
        cuda: ``torch.cuda``, or what stands in for it.
    """

    def __init__(self, device: torch.device, cuda: Any = None) -> None:
        self._device = device
        self._cuda = torch.cuda if cuda is None else cuda
        self._pairs: list[tuple[Any, Any]] = []  # (begin, end) of what counts

    def __enter__(self) -> None:
        begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(self._cuda.current_stream(self._device))
        self._pairs.append((begin, end))

    def __exit__(self, *_: object) -> None:
        self._pairs[-1][1].record(self._cuda.current_stream(self._device))

    def take_total_s(self) -> float:
        """Seconds on the device since this was last asked; waits for the device."""
        self._cuda.synchronize(self._device)
        total_ms = sum(begin.elapsed_time(end) for begin, end in self._pairs)
        self._pairs.clear()
        return float(total_ms) / 1e3
