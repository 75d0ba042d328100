from __future__ import annotations

import pytest
import torch

from helixbench.profiler.measure.disturbance import find_disturbance, gpu_disturbance, steal_disturbance
from tests.profiler.test_device import FakeNvml, FakeNvmlError


class Gpu(FakeNvml):
    """One whose throttle reasons and clock a test sets."""

    nvmlClocksThrottleReasonApplicationsClocksSetting = 2  # noqa: N815
    nvmlClocksThrottleReasonSwThermalSlowdown = 32  # noqa: N815
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128  # noqa: N815

    def __init__(self, reasons: int, clock_mhz: int = 1900) -> None:
        super().__init__()
        self.reasons, self.clock_mhz = reasons, clock_mhz

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:  # noqa: N802
        if handle == "slice":
            raise FakeNvmlError("Not Supported")
        return self.reasons

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        return self.clock_mhz


@pytest.mark.parametrize(
    ("reasons", "clock_mhz", "cause"),
    [
        (0, 1900, None),
        (4, 1400, None),  # a power limit is how the device is served
        (64 | 4, 1400, "HwThermalSlowdown"),
        (32, 1800, "SwThermalSlowdown"),
        (128, 1800, "HwPowerBrakeSlowdown"),
        (1, 345, "low clock"),
        (2, 345, None),  # and so is a clock that somebody set
        (4, 345, None),
    ],
)
def test_a_gpu_block_is_spoilt_by_passing_reasons_alone(reasons: int, clock_mhz: int, cause: str | None) -> None:
    gpu = Gpu(0)
    disturbance = gpu_disturbance(gpu, "first")
    assert disturbance()() is None, "awake"
    gpu.reasons, gpu.clock_mhz = reasons, clock_mhz
    assert disturbance()() == cause


def test_a_clock_that_is_locked_far_below_the_devices_highest_spoils_nothing() -> None:
    gpu = Gpu(0, clock_mhz=900)  # of 1980
    disturbance = gpu_disturbance(gpu, "first")
    assert [disturbance()() for _ in range(3)] == [None] * 3
    gpu.clock_mhz = 300
    assert disturbance()() == "low clock"


def test_a_gpu_that_does_not_say_spoils_nothing() -> None:
    class Slice(Gpu):
        def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
            raise FakeNvmlError("Not Supported")

    assert gpu_disturbance(Slice(64), "slice")()() is None


def stat(user: int, idle: int, steal: int) -> str:
    return f"cpu  {user} 0 100 {idle} 5 0 1 {steal} 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n"


@pytest.mark.parametrize(
    ("user", "idle", "steal", "cause"),
    [(1000, 900, 0, None), (1000, 900, 50, None), (1000, 900, 200, "steal"), (0, 900, 1, None), (5, 900, 3, "steal")],
)
def test_time_that_the_host_took_spoils_a_block(user: int, idle: int, steal: int, cause: str | None) -> None:
    texts = iter([stat(500, 700, 10), stat(500 + user, 700 + idle, 10 + steal)])
    assert steal_disturbance(lambda: next(texts))()() == cause


def test_this_machine_says_something_or_nothing() -> None:
    assert find_disturbance(torch.device("cpu"))()() in (None, "steal")
