"""Let the C library keep the memory that iterations free, so that the next one does not fault it in page by page."""

from __future__ import annotations

import ctypes
import ctypes.util

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_MMAP_ABOVE_BYTES = 32 << 20  # the most that glibc takes; weights and KV caches are larger
_TRIM_ABOVE_BYTES = 1 << 30


def keep_heap() -> bool:
    """Raise glibc's thresholds for giving memory back; ``False`` where the C library has none."""
    mallopt = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_ABOVE_BYTES) and mallopt(_M_TRIM_THRESHOLD, _TRIM_ABOVE_BYTES))
