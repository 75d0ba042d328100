"""Units of sizes and rates, and how people write them in files and options."""

from __future__ import annotations

import re
from collections.abc import Mapping

GB = 10**9

_BYTES: Mapping[str, float] = {
    "B": 1.0,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "TiB": 2.0**40,
}
_SECONDS: Mapping[str, float] = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_BYTES_PER_S: Mapping[str, float] = {"bit": 1 / 8, "Kbit": 1e3 / 8, "Mbit": 1e6 / 8, "Gbit": 1e9 / 8, "Tbit": 1e12 / 8}


def parse_bytes(text: str) -> float:
    """Bytes from text like ``"1500MB"`` (10**6), ``"20GB"`` or ``"512MiB"`` (2**20).

    Raises:
        ValueError: not a number > 0 with one of the units.
    """
    return _parse(text, _BYTES, example="1500MB, 20GB or 512MiB")


def parse_bytes_per_s(text: str) -> float:
    """Bytes per second from bits per second like ``"400Mbit"``, ``"1Gbit"`` or ``"80Kbit"``.

    Raises:
        ValueError: not a number > 0 with one of the units.
    """
    return _parse(text, _BYTES_PER_S, example="80Kbit, 400Mbit or 1Gbit")


def parse_seconds(text: str) -> float:
    """Seconds that ``"50ms"``, ``"200us"`` or ``"0.5s"`` stand for.

    Raises:
        ValueError: not a number > 0 with one of the units.
    """
    return _parse(text, _SECONDS, example="200us, 50ms or 0.5s")


def _parse(text: str, units: Mapping[str, float], *, example: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text, flags=re.ASCII)
    if match is None or match[2] not in units:
        raise ValueError(f"not a number and one of the units {', '.join(units)}; write it like {example}")
    value = float(match[1]) * units[match[2]]
    if value <= 0:
        raise ValueError(f"need more than 0; write it like {example}")
    return value
