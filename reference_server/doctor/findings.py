"""What a check says, and what is to be done."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["ok", "warning", "problem"]
GB = 1e9


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One check of one node; ``remedy`` is one line, and empty where nothing is to be done."""

    check: str
    state: State
    says: str
    remedy: str = ""


def ok(check: str, says: str) -> Finding:
    """Nothing to be done."""
    return Finding(check=check, state="ok", says=says)


def warning(check: str, says: str, remedy: str) -> Finding:
    """It works, but numbers may be worse than they could, or something is left out."""
    return Finding(check=check, state="warning", says=says, remedy=remedy)


def problem(check: str, says: str, remedy: str) -> Finding:
    """It does not work, or what is measured would mislead."""
    return Finding(check=check, state="problem", says=says, remedy=remedy)
