"""Verdict: what a run says about its plan, in numbers and in words. The file ``verdict.json``."""

from __future__ import annotations

from typing import Literal

import msgspec

from helixbench.records import Provenance
from helixbench.solver.problem.plan import LayerRange

Outcome = Literal["as predicted", "below expected", "above expected", "above bound", "could not measure"]


class Band(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What counts as predicted: measured / expected in ``[min_ratio, max_ratio]``, and not above the bound.

    ``max_bound_ratio`` leaves room for noise in measured / bound. A run above the bound is never good news: it is an
    error in the model or in the units.
    """

    min_ratio: float = 0.85
    max_ratio: float = 1.05
    max_bound_ratio: float = 1.05

    def __post_init__(self) -> None:
        if not 0 < self.min_ratio <= self.max_ratio < float("inf"):
            raise ValueError(f"need 0 < min_ratio <= max_ratio, got {self.min_ratio} and {self.max_ratio}")
        if not 1 <= self.max_bound_ratio < float("inf"):
            raise ValueError(f"max_bound_ratio: need >= 1, got {self.max_bound_ratio}")


class Interval(msgspec.Struct, frozen=True, array_like=True):
    """Low and high end. In JSON: ``[low, high]``."""

    low: float
    high: float


class NodeResidual(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One node: what the plan said beside what the run did.

    Shares are of all tokens served, busy is a share of time, batch is mean decode tokens an iteration. ``None`` where
    the plan does not say, or where the node ran nothing. The coordinator holds no layers.
    """

    name: str
    layers: LayerRange | None
    planned_share: float
    realised_share: float
    predicted_busy: float | None
    measured_busy: float
    predicted_batch_tokens: float | None
    measured_batch_tokens: float | None
    predicted_iteration_s: float | None
    measured_iteration_s: float | None
    kv_peak_tokens: int
    kv_capacity_tokens: int


class LinkResidual(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One link: planned against realised share of the tokens, and the bytes that crossed it in the window."""

    src: str
    dst: str
    planned_share: float
    realised_share: float
    measured_bytes_per_s: float


class Latency(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds over the requests that finished in the window; the plan predicts their mean."""

    kind: Literal["ttft", "tpot"]
    num_requests: int
    predicted_mean_s: float | None
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One way in which the record could contradict itself, and whether it does."""

    name: str
    is_passed: bool
    message: str


STALE_NOTE = "stale profile: "
"""What a note begins with that says how the profile differs from what was served on."""


class Verdict(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.verdict/1",
):
    """A run held against its plan. ``None`` where a number could not be had; the reasons then say why."""

    outcome: Outcome
    statement: str
    reasons: tuple[str, ...]
    causes: tuple[str, ...]
    band: Band
    concurrency: int
    bound_tokens_per_s: float
    upper_bound_tokens_per_s: float
    expected_tokens_per_s: float | None
    expected_interval: Interval | None
    measured_tokens_per_s: float | None
    measured_interval: Interval | None
    measured_output_tokens_per_s: float | None
    ratio_to_expected: float | None
    ratio_to_bound: float | None
    bottleneck: tuple[str, ...]
    nodes: tuple[NodeResidual, ...]
    links: tuple[LinkResidual, ...]
    latencies: tuple[Latency, ...]
    checks: tuple[Check, ...]
    is_simulated: bool
    testbed: str
    notes: tuple[str, ...]
    plan_digest: str
    run_digest: str
    provenance: Provenance
