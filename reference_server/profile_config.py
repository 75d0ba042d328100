"""What a profile measures, and how long."""

from __future__ import annotations

from pathlib import Path

import msgspec


class ProfileConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure, and how long.

    ``limited_nics`` are nodes (or the coordinator) whose network card the testbed limits: where a node's links could
    not be measured at once, the best of them is what such a card carries. ``testbed`` is the line that says what the
    testbed isolates, ``command`` the user's. ``regions`` maps nodes to the place that shares fast
    links, where the testbed names one.
    """

    model: str
    dtype: str
    addresses: dict[str, str]
    key_file: Path
    output: Path
    testbed: str
    limited_nics: tuple[str, ...]
    command: str = ""
    regions: dict[str, str] = {}
    max_batch_tokens: int = 128
    max_context_tokens: int = 512
    budget_s: float = 100.0
    link_seconds: float = 1.0
