"""A suite: cases, each of which combines a testbed and a workload. Values only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from helixbench.reference_server.testbed.spec import TestbedSpec
from helixbench.solver.problem.workload import Workload

Positive = Annotated[int, msgspec.Meta(ge=1)]
Amount = Annotated[float, msgspec.Meta(gt=0)]
Concurrency = Positive | Literal["kv-full"]
KV_FULL: Literal["kv-full"] = "kv-full"


class SuiteTestbed(msgspec.Struct, frozen=True, kw_only=True):
    """A testbed: its specification, its TOML text, and its file (``None`` if it is defined in the suite)."""

    name: str
    spec: TestbedSpec
    text: str
    file: Path | None


class ModelChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The model of all cases: what ``helixbench model make`` writes, or a directory or hub id (``path``).

    It writes a ``preset``, or the shapes of a large model (``like``).
    """

    preset: str | None = None
    seed: int | None = None
    like: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("preset", "like", "path") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"model: {' and '.join(given)} exclude each other; give one")
        if self.seed is not None and not {"like", "path"}.isdisjoint(given):
            raise ValueError(f"model: `seed` is of a preset; remove it beside {given[0]}")

    @property
    def make_arguments(self) -> tuple[str, ...]:
        """Those of ``model make``."""
        if self.like is not None:
            return "--like", self.like
        return "--preset", self.preset or "tiny", "--seed", str(self.seed or 0)


class ProfileLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of ``helixbench profile``."""

    budget_s: Amount = 100.0
    max_batch_tokens: Positive = 128
    max_context_tokens: Positive = 512


class SuiteCase(msgspec.Struct, frozen=True, kw_only=True):
    """One workload on one testbed. The window contains ``requests`` finished requests, or lasts ``duration_s``.

    ``concurrency`` counts requests in flight; ``"kv-full"`` is as many as fit into the plan's KV caches.
    """

    name: str
    testbed: SuiteTestbed
    workload: Workload
    concurrency: Concurrency
    requests: int | None = None
    duration_s: float | None = None


class Suite(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a suite file; ``cases`` in its order."""

    name: str
    model: ModelChoice
    profile: ProfileLimits
    solve_time_limit_s: float
    cases: tuple[SuiteCase, ...]

    @property
    def testbeds(self) -> tuple[SuiteTestbed, ...]:
        """The testbeds of the cases, each once."""
        return tuple({case.testbed.name: case.testbed for case in self.cases}.values())
