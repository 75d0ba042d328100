from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from profiler import memory
from profiler.errors import MeasurementError
from profiler.memory import resident_bytes, workspace_bytes

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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_workspace_on_cuda_is_that_of_the_allocator() -> None:
    device = torch.device("cuda:0")
    held = torch.ones(1 << 20, dtype=torch.uint8, device=device)

    def run() -> None:
        torch.ones(1 << 22, dtype=torch.uint8, device=device)

    assert workspace_bytes(run, device=device) == 1 << 22
    assert held.numel() == 1 << 20
