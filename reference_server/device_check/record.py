"""What a check of a device found."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from helixbench.records import Provenance

Status: TypeAlias = Literal["pass", "fail", "over time", "not run"]


class Found(msgspec.Struct, frozen=True):
    """What a step says where nothing is wrong: one line, and figures with their units in their names."""

    says: str
    figures: dict[str, float] = {}


class StepResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One step: how it ended, how long it took, and what it says."""

    name: str
    proves: str
    status: Status = "not run"
    seconds: float = 0.0
    says: str = ""
    figures: dict[str, float] = {}


class DeviceCheck(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.device-check/1",
):
    """All steps, those that did not run among them."""

    device: str
    steps: tuple[StepResult, ...]
    provenance: Provenance = Provenance()

    @property
    def is_good(self) -> bool:
        """Whether every step ran and passed."""
        return all(step.status == "pass" for step in self.steps)
