"""What came out of a suite: records only. The file ``suite.json``."""

from __future__ import annotations

from typing import Literal

import msgspec

from helixbench.records import Provenance
from helixbench.reports.verdict.verdict import Interval
from helixbench.solver.problem.plan import LayerRange

CaseOutcome = Literal["ok", "off", "inconclusive", "not measured"]


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the median of the repeats keeps: measured / expected of total tokens/s, and how far off TPOT may be."""

    min_ratio: float = 0.95
    max_ratio: float = 1.05
    tpot: float = 0.10

    def __post_init__(self) -> None:
        if not 0 < self.min_ratio <= self.max_ratio < float("inf"):
            raise ValueError(f"need 0 < min_ratio <= max_ratio, got {self.min_ratio} and {self.max_ratio}")
        if not 0 < self.tpot < 1:
            raise ValueError(f"tpot: need a share between 0 and 1, got {self.tpot}")


class NodeBias(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One node, medians over the repeats. A bias is measured / predicted - 1; ``None`` where the plan does not say."""

    name: str
    layers: LayerRange | None
    predicted_busy: float | None
    measured_busy: float
    busy_bias: float | None
    predicted_batch_tokens: float | None
    measured_batch_tokens: float | None
    batch_bias: float | None
    predicted_iteration_s: float | None
    measured_iteration_s: float | None
    iteration_bias: float | None


class LinkBias(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One link, medians over the repeats; ``share_bias`` is the difference of the two shares."""

    src: str
    dst: str
    planned_share: float
    realised_share: float
    share_bias: float
    measured_bytes_per_s: float


class LatencyBias(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One latency, medians over the repeats. A bias is measured / predicted - 1; ``None`` where nothing predicts it.

    The plan predicts the median request; the 90th and 99th percentile are those of its simulation.
    """

    kind: Literal["ttft", "tpot"]
    p50_s: float
    p90_s: float
    p99_s: float
    predicted_p50_s: float | None = None
    predicted_p90_s: float | None = None
    predicted_p99_s: float | None = None
    p50_bias: float | None = None
    p90_bias: float | None = None
    p99_bias: float | None = None


class CaseResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One case. Tokens/s are prompt and output tokens alike; ``measured`` is the median of the repeats.

    ``measured_interval`` is the 95 % interval of the repeats' mean, ``expected_interval`` the plan's own. ``spread`` is
    the largest ratio less the smallest. ``reasons`` say why a repeat is missing, ``causes`` where the repeat with the
    median ratio points, ``stale`` how the profile's device, versions or model differ from what a repeat was served on.
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
    nodes: tuple[NodeBias, ...] = ()
    links: tuple[LinkBias, ...] = ()
    latencies: tuple[LatencyBias, ...] = ()


class SuiteResult(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.suite/2",
):
    """All cases of a suite, in its order. ``testbeds``: name -> how it was run. The file ``suite.json``."""

    suite: str
    tolerance: Tolerance
    repeats: int
    is_interrupted: bool
    cases: tuple[CaseResult, ...]
    testbeds: dict[str, str]
    provenance: Provenance
