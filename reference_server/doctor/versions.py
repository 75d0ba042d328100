"""Versions, compared by their numbers."""

from __future__ import annotations

import re


def is_within(version: str, wanted: str) -> bool:
    """Whether a version meets comma-separated bounds like ``>=2.11,<2.14``; bounds of other kinds are not looked at."""
    number = numbers(version)
    for bound in wanted.split(","):
        match = re.fullmatch(r"\s*(>=|<)\s*([\d.]+)\s*", bound)
        if match is None:
            continue
        limit = numbers(match[2])
        width = max(len(number), len(limit))
        padded, padded_limit = ((*parts, *[0] * (width - len(parts))) for parts in (number, limit))
        if (padded < padded_limit) if match[1] == ">=" else (padded >= padded_limit):
            return False
    return True


def numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: of ``2.13.0+cpu`` 2, 13 and 0."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
