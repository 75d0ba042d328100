"""Verdict: a run compared with its plan, in numbers and in words. The file ``verdict.json``."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from helixbench.records import Provenance
from helixbench.reports.verdict.client import ClientResult
from helixbench.solver.problem.plan import LayerRange, Percentiles


class Outcome(StrEnum):
    """Where measured / expected lies. Anything that prevents a comparison is ``NOT_MEASURED``, never a pass.

    An emulated run is ``UNSOUND`` where this machine did not keep up with the devices, so that its times are its own.
    """

    AS_PREDICTED = "as predicted"
    BELOW_EXPECTED = "below expected"
    ABOVE_EXPECTED = "above expected"
    ABOVE_BOUND = "above bound"
    NOT_MEASURED = "could not measure"
    UNSOUND = "unsound"

    @property
    def is_comparison(self) -> bool:
        """Whether measured and expected could be compared at all."""
        return self not in (Outcome.NOT_MEASURED, Outcome.UNSOUND)


class Band(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Accepted range of measured / expected, and the largest accepted measured / bound.

    ``max_latency_ratio`` is the largest accepted measured / promised percentile of TTFT and TPOT, if one is promised.
    ``max_bound_ratio`` leaves room for noise. No run can exceed the bound, so a larger ratio means that the cost model
    or a unit is wrong.
    """

    min_ratio: float = 0.85
    max_ratio: float = 1.05
    max_bound_ratio: float = 1.05
    max_latency_ratio: float = 1.25

    def __post_init__(self) -> None:
        if not 0 < self.min_ratio <= self.max_ratio < float("inf"):
            raise ValueError(f"need 0 < min_ratio <= max_ratio, got {self.min_ratio} and {self.max_ratio}")
        if not 1 <= self.max_bound_ratio < float("inf"):
            raise ValueError(f"max_bound_ratio: need >= 1, got {self.max_bound_ratio}")
        if not 1 <= self.max_latency_ratio < float("inf"):
            raise ValueError(f"max_latency_ratio: need >= 1, got {self.max_latency_ratio}")


class Interval(msgspec.Struct, frozen=True, array_like=True):
    """Lower and upper end; ``[low, high]`` in JSON."""

    low: float
    high: float


class NodeResidual(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One node, predicted and measured.

    Shares are of all tokens, busy is a share of time, batch is decode tokens per iteration on average. ``None`` where
    the plan makes no prediction or the node ran no iteration. The coordinator holds no layers.
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
    """One link: planned and realised share of the tokens, and the payload that crossed it in the window."""

    src: str
    dst: str
    planned_share: float
    realised_share: float
    measured_bytes_per_s: float


MIN_BEYOND = 10


class Latency(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Latency of the requests that finished in the window.

    ``promised`` are the percentiles that the plan predicts; a gate holds the run to those of an open loop
    (``is_held``). In a closed loop it judges tokens/s, which by Little's law are the latency.
    """

    kind: Literal["ttft", "tpot"]
    num_requests: int
    predicted_mean_s: float | None
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    promised: Percentiles | None = None
    is_held: bool = False

    @property
    def ratios(self) -> dict[int, float]:
        """Percentile -> measured / promised, for those that the run is held to and that the requests settle.

        A percentile is settled where at least ``MIN_BEYOND`` requests are beyond it: 20 requests for p50, 1000 for p99.
        """
        if self.promised is None or not self.is_held:
            return {}
        pairs = {
            50: (self.p50_s, self.promised.p50_s),
            90: (self.p90_s, self.promised.p90_s),
            99: (self.p99_s, self.promised.p99_s),
        }
        return {
            percent: measured / promised
            for percent, (measured, promised) in pairs.items()
            if promised > 0 and self.num_requests * (100 - percent) >= 100 * MIN_BEYOND
        }


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One consistency check of the run record."""

    name: str
    is_passed: bool
    message: str


class ClientVerdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What another client measured of the same plan, by the rules of the run's own verdict."""

    result: ClientResult
    outcome: Outcome
    statement: str
    ratio_to_expected: float | None
    ratio_to_measured: float | None
    latencies: tuple[Latency, ...] = ()


class Verdict(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.verdict/2",
):
    """A run compared with its plan. Where a number is ``None``, ``reasons`` say why.

    ``causes`` list likely explanations of a wrong prediction, ``stale`` the differences between the environment that
    was profiled and the one that served.
    """

    outcome: Outcome
    statement: str
    reasons: tuple[str, ...]
    causes: tuple[str, ...]
    band: Band
    concurrency: int
    arrivals: str = "closed loop"
    bound_tokens_per_s: float
    upper_bound_tokens_per_s: float
    expected_tokens_per_s: float | None
    expected_interval: Interval | None
    measured_tokens_per_s: float | None
    measured_interval: Interval | None
    measured_output_tokens_per_s: float | None
    ratio_to_expected: float | None
    ratio_to_bound: float | None
    goodput_per_s: float | None = None
    promised_goodput_per_s: float | None = None
    goodput_limits: str = ""
    bottleneck: tuple[str, ...]
    nodes: tuple[NodeResidual, ...]
    links: tuple[LinkResidual, ...]
    latencies: tuple[Latency, ...]
    checks: tuple[Check, ...]
    is_simulated: bool
    is_emulated: bool = False
    testbed: str
    stale: tuple[str, ...]
    notes: tuple[str, ...]
    plan_digest: str
    run_digest: str
    provenance: Provenance
    client: ClientVerdict | None = None
