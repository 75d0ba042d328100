from __future__ import annotations

from pathlib import Path

import pytest

from profiler import cold_cache
from profiler.cold_cache import CacheFlood


@pytest.mark.parametrize(
    ("said", "bytes_read"),
    [("8192K\n", 12 << 20), (None, 48 << 20), ("strange", 48 << 20), ("1048576K", 128 << 20)],
)
def test_more_than_the_cache_holds_is_read_and_not_without_end(
    said: str | None, bytes_read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = tmp_path / "size"
    if said is not None:
        size.write_text(said)
    monkeypatch.setattr(cold_cache, "_LEVEL_3", size)
    flood = CacheFlood()
    assert flood.num_bytes == bytes_read
    assert flood(streamed_bytes=0.0) == bytes_read
    assert flood(streamed_bytes=bytes_read - 4e6) == 4_000_000
    assert flood(streamed_bytes=bytes_read + 1e6) == 0
