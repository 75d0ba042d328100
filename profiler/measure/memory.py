"""Memory as the system counts it: what a loaded stage occupies beyond its tensors, and the peak of an iteration."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from helixbench.errors import HelixbenchError, MeasurementError
from helixbench.profiler.cost.measured import MemoryUse
from helixbench.profiler.stage.stage import Stage

_CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_CUBLAS_OUT_OF_MEMORY = "CUBLAS_STATUS_ALLOC_FAILED"
_RESET_PEAK = "5"  # written to clear_refs: resets VmHWM; see proc(5)


@contextmanager
def out_of_memory_is(error_type: type[HelixbenchError], what: str) -> Iterator[None]:
    """Raise that error, with the remedy, where the device has no memory for what is done in here."""
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise error_type(
            f"{what}: no memory is left on the device; end what else uses it, or start the agent with less --memory, "
            f"profile and solve again ({error})"
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Torch's allocator says it by a type, the CUDA runtime by a number, cuBLAS in words alone."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY
    return _CUBLAS_OUT_OF_MEMORY in str(error)


def release_cached(device: torch.device, cuda: Any = None) -> None:
    """Give a GPU what a dropped stage has left in the allocator's cache; a processor's memory has none.

    Args:
        device: where the stage was.
        cuda: ``torch.cuda``, or what stands in for it.
    """
    if device.type == "cuda":
        gc.collect()  # a stage may be part of a cycle of references
        (torch.cuda if cuda is None else cuda).empty_cache()


def workspace_bytes(run: Callable[[], None], *, device: torch.device) -> float:
    """Peak bytes that ``run`` adds, by the resident set on CPU; on CUDA see ``cuda_workspace_bytes``.

    Raises:
        MeasurementError: the operating system does not say.
    """
    if device.type == "cuda":
        return cuda_workspace_bytes(run, device=device)
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        before = _status_bytes("VmRSS")
        run()
        return float(max(0, _status_bytes("VmHWM") - before))
    except OSError as error:
        raise MeasurementError(f"the peak of resident memory cannot be read here ({error}); /proc is needed") from error


def cuda_workspace_bytes(run: Callable[[], None], *, device: torch.device, cuda: Any = None) -> float:
    """Bytes that the device lacks after ``run``, which began with nothing cached: what the allocator took and keeps.

    That is its peak in whole segments, and beside it what libraries allocate past it at their first kernel. Where
    another process freed memory meanwhile, at least by how much the allocator's segments grew.

    Args:
        run: what is measured.
        device: where it runs.
        cuda: ``torch.cuda``, or what stands in for it.
    """
    cuda = torch.cuda if cuda is None else cuda
    cuda.synchronize(device)
    cuda.empty_cache()
    cuda.reset_peak_memory_stats(device)
    reserved, (free, _) = cuda.memory_reserved(device), cuda.mem_get_info(device)
    run()
    cuda.synchronize(device)
    gone = free - cuda.mem_get_info(device)[0]
    return float(max(gone, cuda.max_memory_reserved(device) - reserved))


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
