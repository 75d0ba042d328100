"""Memory that an iteration takes beside weights and KV cache: the peak while it runs, less what lay there before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .errors import MeasurementError

_RESET_PEAK = "5"  # written to clear_refs: resets VmHWM; see proc(5)


def workspace_bytes(run: Callable[[], None], *, device: torch.device) -> float:
    """Peak bytes that ``run`` adds: by torch's allocator on CUDA, by the resident set on CPU.

    Raises:
        MeasurementError: the operating system does not say.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        before = _status_bytes("VmRSS")
        run()
        return float(max(0, _status_bytes("VmHWM") - before))
    except OSError as error:
        raise MeasurementError(f"the peak of resident memory cannot be read here ({error}); /proc is needed") from error


def resident_bytes() -> int:
    """Resident set of this process.

    Raises:
        OSError: no ``/proc``.
    """
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")
