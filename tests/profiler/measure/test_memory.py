from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helixbench.errors import HelixbenchError, InputError, MeasurementError
from helixbench.profiler.measure import memory
from helixbench.profiler.measure.memory import (
    cuda_workspace_bytes,
    out_of_memory_is,
    release_cached,
    resident_bytes,
    workspace_bytes,
)

MEGABYTE = 1_000_000
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


def test_workspace_is_the_peak_and_not_what_is_left() -> None:
    def run() -> None:
        for _ in range(3):
            np.ones(40 * MEGABYTE, dtype=np.uint8)  # one after the other

    assert workspace_bytes(run, device=CPU) == pytest.approx(40 * MEGABYTE, abs=6 * MEGABYTE)


def test_a_peak_of_before_does_not_count() -> None:
    np.ones(80 * MEGABYTE, dtype=np.uint8)

    assert workspace_bytes(lambda: None, device=CPU) < 6 * MEGABYTE


def test_resident_memory_grows_with_what_is_touched() -> None:
    before = resident_bytes()
    untouched = np.empty(50 * MEGABYTE, dtype=np.uint8)
    between = resident_bytes()
    untouched.fill(1)

    assert between - before < 6 * MEGABYTE
    assert resident_bytes() - between == pytest.approx(50 * MEGABYTE, abs=6 * MEGABYTE)


def test_where_the_system_does_not_say_no_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(path: Path, text: str) -> int:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(memory.Path, "write_text", no_proc)
    with pytest.raises(MeasurementError, match=r"the peak of resident memory cannot be read here .* /proc is needed"):
        workspace_bytes(lambda: None, device=CPU)


class FakeCuda:
    """A device whose allocator takes whole segments and gives them back when asked to."""

    SEGMENT = 20

    def __init__(self, *, reserved: int, cached: int, free: int) -> None:
        self.reserved, self.cached, self.free, self.peak = reserved, cached, free, 10**9

    def synchronize(self, device: torch.device) -> None:
        assert device.type == "cuda"

    def empty_cache(self) -> None:
        self.reserved, self.free, self.cached = self.reserved - self.cached, self.free + self.cached, 0

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.reserved

    def memory_reserved(self, device: torch.device) -> int:
        return self.reserved

    def max_memory_reserved(self, device: torch.device) -> int:
        return self.peak

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.free, 1000

    def allocate(self, size: int) -> None:
        size = -(-size // self.SEGMENT) * self.SEGMENT
        self.reserved, self.free = self.reserved + size, self.free - size
        self.peak = max(self.peak, self.reserved)


CUDA = torch.device("cuda:0")


def test_workspace_on_cuda_counts_segments_and_what_libraries_take_beside_them() -> None:
    cuda = FakeCuda(reserved=300, cached=80, free=500)

    def run() -> None:
        cuda.allocate(70)  # would have fitted what was cached
        cuda.free -= 33  # not through the allocator

    assert cuda_workspace_bytes(run, device=CUDA, cuda=cuda) == 80 + 33


def test_workspace_on_cuda_is_not_made_smaller_by_another_process_that_ends() -> None:
    cuda = FakeCuda(reserved=300, cached=0, free=500)

    def run() -> None:
        cuda.allocate(40)
        cuda.free += 400

    assert cuda_workspace_bytes(run, device=CUDA, cuda=cuda) == 40


@pytest.mark.parametrize("error_type", [InputError, MeasurementError])
def test_memory_that_is_out_is_said_with_what_to_do(error_type: type[HelixbenchError]) -> None:
    message = r"the head: no memory is left on the device; .* less --memory, profile and solve again \(2 GiB wanted\)"
    with pytest.raises(error_type, match=message), out_of_memory_is(error_type, "the head"):
        raise torch.OutOfMemoryError("2 GiB wanted")
    with pytest.raises(ValueError, match="another"), out_of_memory_is(error_type, "the head"):
        raise ValueError("another")


def test_libraries_say_in_ways_of_their_own_that_memory_is_out() -> None:
    """The CUDA runtime by a number, cuBLAS in words; other failures of the device are none of memory."""
    by_number = torch.AcceleratorError("CUDA error: out of memory\nmore")
    by_number.error_code = 2  # type: ignore[attr-defined]
    for error in (by_number, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")):
        with pytest.raises(InputError, match="no memory is left"), out_of_memory_is(InputError, "the head"):
            raise error
    lost = torch.AcceleratorError("CUDA error: unspecified launch failure")
    lost.error_code = 719  # type: ignore[attr-defined]
    with pytest.raises(torch.AcceleratorError, match="launch failure"), out_of_memory_is(InputError, "the head"):
        raise lost


def test_what_a_stage_left_in_the_cache_goes_back_to_a_gpu_alone() -> None:
    cuda = FakeCuda(reserved=300, cached=70, free=500)
    release_cached(CUDA, cuda)
    assert cuda.free == 570
    release_cached(torch.device("cpu"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_workspace_on_cuda_is_at_least_what_was_allocated() -> None:
    device = torch.device("cuda:0")
    held = torch.ones(1 << 20, dtype=torch.uint8, device=device)

    def run() -> None:
        torch.ones(1 << 26, dtype=torch.uint8, device=device)

    assert 1 << 26 <= workspace_bytes(run, device=device) <= 1 << 27
    assert held.numel() == 1 << 20
