"""Results of a suite. The file ``suite.json``."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from helixbench.records import Provenance
from helixbench.reports.verdict.verdict import Band, Interval, Latency, LinkResidual, NodeResidual


class CaseOutcome(StrEnum):
    """``INCONCLUSIVE``: the repeats vary too much to decide."""

    OK = "ok"
    OFF = "off"
    INCONCLUSIVE = "inconclusive"
    NOT_MEASURED = "not measured"


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the median of the repeats must meet: measured / expected total tokens/s, and the relative error of TPOT."""

    band: Band = Band(min_ratio=0.95, max_ratio=1.05)
    tpot: float = 0.10

    def __post_init__(self) -> None:
        if not 0 < self.tpot < 1:
            raise ValueError(f"tpot: need a share between 0 and 1, got {self.tpot}")


class CaseResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One case. Tokens/s are total; measured values, residuals and latencies are medians over the repeats.

    ``measured_interval`` is the 95 % interval of the repeats' mean, ``expected_interval`` the plan's own. ``spread`` is
    the largest ratio minus the smallest. ``simulated`` has the latencies of the simulated plan. ``reasons`` say why a
    repeat is missing, ``causes`` are those of the repeat with the median ratio.
    """

    name: str
    testbed: str
    workload: str
    concurrency: int | None
    outcome: CaseOutcome
    statement: str
    asked_repeats: int
    num_repeats: int
    reasons: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    bound_tokens_per_s: float | None = None
    expected_tokens_per_s: float | None = None
    expected_interval: Interval | None = None
    measured_tokens_per_s: float | None = None
    measured_interval: Interval | None = None
    ratios: tuple[float, ...] = ()
    ratio: float | None = None
    spread: float | None = None
    tpot_ratios: tuple[float, ...] = ()
    tpot_ratio: float | None = None
    ttft_ratio: float | None = None
    nodes: tuple[NodeResidual, ...] = ()
    links: tuple[LinkResidual, ...] = ()
    latencies: tuple[Latency, ...] = ()
    simulated: tuple[Latency, ...] = ()


class SuiteResult(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.suite/3",
):
    """All cases of a suite, in its order. ``testbeds`` maps each testbed to how it was run."""

    suite: str
    tolerance: Tolerance
    repeats: int
    is_interrupted: bool
    cases: tuple[CaseResult, ...]
    testbeds: dict[str, str]
    provenance: Provenance
