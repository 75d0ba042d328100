"""Memory that an iteration frees is there for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from reference_server.heap import keep_heap
if sys.argv[1] == "keep":
    assert keep_heap()
def iteration(size):
    parts = [torch.zeros(size + 4096 * i, dtype=torch.uint8) for i in range(8)]
    return sum(int(part[0]) for part in parts)
for size in range(1 << 20, 3 << 20, 1 << 18):
    iteration(size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in [1 << 20, 3 << 20, 2 << 20] * 10:
    iteration(size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_kept_heap_is_not_faulted_in_again() -> None:
    keep, plain = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "plain")
    )
    assert keep < plain / 4
