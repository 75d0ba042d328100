"""Memory that an iteration frees is there for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import os, resource, sys
import torch
from helixbench.reference_server.testbed.heap import keep_heap
if os.fork() == 0:  # two processes that differ in nothing else
    assert keep_heap()
else:
    os.wait()
def iteration(size):
    parts = [torch.zeros(size + 4096 * i, dtype=torch.uint8) for i in range(8)]
    return sum(int(part[0]) for part in parts)
for size in range(1 << 20, 3 << 20, 1 << 18):
    iteration(size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in [1 << 20, 3 << 20, 2 << 20] * 10:
    iteration(size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_kept_heap_is_not_faulted_in_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
    keep, plain = map(int, done.stdout.split())
    assert keep < plain / 4
