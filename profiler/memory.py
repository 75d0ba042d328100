"""Memory as the system counts it: what a loaded stage occupies beyond its tensors, and the peak of an iteration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .errors import MeasurementError
from .quality import MemoryUse
from .stage import Stage

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


class LoadedMemory:
    """What a stage occupies beyond its tensors: made before it is loaded, asked afterwards.

    On CPU by the anonymous memory of the process; on CUDA by what the driver says is in use, which holds the context,
    the allocator's rounding and other processes.

    Args:
        device: where the stage is loaded.
        memory_bytes: what weights, workspace and KV cache may use together: on CUDA, what the device has beyond that
            pays for the context first.

    Raises:
        MeasurementError: the operating system does not say.
    """

    def __init__(self, device: torch.device, *, memory_bytes: float) -> None:
        self._device = device
        self._memory_bytes = memory_bytes
        self._before = _anonymous_bytes() if device.type == "cpu" else 0

    def use_of(self, stage: Stage, *, workspace_bytes: float = 0.0) -> MemoryUse:
        """The figures of the loaded stage; every slot of its KV cache is written, so that it is there."""
        arena = stage.kv.arena
        arena.zero_()
        num_layers = stage.end - stage.start
        tensors = stage.weight_bytes + arena.nbytes
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            free, total = torch.cuda.mem_get_info(self._device)
            beyond = total - self._memory_bytes
            overhead, source = max(0.0, total - free - tensors - beyond), "the CUDA driver's free memory"
        else:
            overhead = float(max(0, _anonymous_bytes() - self._before - tensors))
            source = "anonymous memory of the process"
        return MemoryUse(
            num_layers=num_layers,
            weight_bytes=float(stage.weight_bytes),
            kv_bytes_per_token_per_layer=arena.nbytes / stage.kv.capacity_tokens / num_layers,
            overhead_bytes=overhead,
            workspace_bytes=workspace_bytes,
            source=source,
        )


def _anonymous_bytes() -> int:
    try:
        return _status_bytes("RssAnon")
    except OSError as error:
        raise MeasurementError(f"the memory in use cannot be read here ({error}); /proc is needed") from error


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
