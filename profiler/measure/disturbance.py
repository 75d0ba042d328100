"""Measured causes that spoil a sample: a GPU that is slowed down, a virtual machine whose host took its time away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helixbench.profiler.device import handle_by_uuid, open_nvml
from helixbench.profiler.measure.sampler import Disturbance

STEAL_LIMIT = 0.1
"""Part of a block's CPU time that the host may take from this virtual machine before the block is measured again."""

LOW_CLOCK = 0.5
"""Part of the highest clock seen at a block's end below which a block was run by a device that had not woken up."""

# Reasons for a low clock that pass.
PASSING_REASONS = (
    "HwThermalSlowdown",
    "SwThermalSlowdown",
    "HwPowerBrakeSlowdown",
)
# A power limit or a clock that somebody set: how the device is served.
SETTINGS = ("ApplicationsClocksSetting", "SwPowerCap")


def find_disturbance(device: torch.device) -> Disturbance:
    """What this device can say; nothing where neither the driver nor the OS counts it."""
    if device.type == "cuda":
        nvml = open_nvml()
        if nvml is not None:
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = handle_by_uuid(nvml, uuid)
            if handle is not None:
                return gpu_disturbance(nvml, handle)
    elif Path("/proc/stat").exists():
        return steal_disturbance(lambda: Path("/proc/stat").read_text(encoding="ascii"))
    return lambda: lambda: None


def gpu_disturbance(nvml: Any, handle: Any) -> Disturbance:
    """By NVML: a passing throttle reason at the end of a block, or a clock far below the highest of all blocks.

    Not below the highest that the device could have, which it never reaches where its clock is locked.
    """
    highest_mhz = 0

    def at_end() -> str | None:
        nonlocal highest_mhz
        try:
            reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
            clock_mhz = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        except nvml.NVMLError:
            return None  # not supported by this device: then nothing is measured, and nothing thrown away

        def holds(reason: str) -> bool:
            return bool(reasons & getattr(nvml, f"nvmlClocksThrottleReason{reason}"))

        highest_mhz = max(highest_mhz, clock_mhz)
        if (passing := next(filter(holds, PASSING_REASONS), None)) is not None:
            return passing
        is_low = clock_mhz < LOW_CLOCK * highest_mhz and not any(map(holds, SETTINGS))
        return "low clock" if is_low else None

    return lambda: at_end


def steal_disturbance(read_stat: Callable[[], str]) -> Disturbance:
    """By ``/proc/stat``: ticks that the host ran something else on this machine's cores while they had work.

    A container's CPU quota does not count: it is how the node is served.
    """

    def begin() -> Callable[[], str | None]:
        before = _ticks(read_stat())

        def end() -> str | None:
            busy, stolen = (b - a for a, b in zip(before, _ticks(read_stat()), strict=True))
            return "steal" if stolen > max(1, STEAL_LIMIT * (busy + stolen)) else None

        return end

    return begin


def _ticks(stat: str) -> tuple[int, int]:
    """Busy and stolen ticks of all cores; see proc_stat(5)."""
    fields = [int(word) for word in stat.splitlines()[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq = fields[:7]
    return user + nice + system + irq + softirq, fields[7] if len(fields) > 7 else 0
