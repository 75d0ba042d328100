"""The plan beside baselines of the same cluster: what each was expected to serve, and what it served."""

from __future__ import annotations

import msgspec

from helixbench.records import Provenance
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.formatting import TIMES, number, ratio, seconds
from helixbench.reports.render.document import Document, Row, Section, section
from helixbench.reports.verdict.validate import validate
from helixbench.reports.verdict.verdict import Verdict


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Throughput in prompt and output tokens, and mean latencies; ``None`` where there is no such figure."""

    tokens_per_s: float | None
    tpot_s: float | None
    ttft_s: float | None


class Served(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A plan under the demo's load.

    ``method`` is that of ``solve``: ``auto`` for the plan itself. ``expected`` is the plan's own prediction, of a loop
    that has settled; ``simulated`` has the very requests that were measured, from the first on. ``kept_up`` is whether
    this machine kept up with the devices that it emulates.
    """

    method: str
    num_nodes: int
    expected: Rates
    simulated: Rates
    measured: Rates
    kept_up: bool

    @classmethod
    def of(cls, method: str, *, run: RunLog, simulated: RunLog) -> Served:
        """What a run and its simulation say of a plan."""
        verdict = validate(run)
        latency = {one.kind: one.predicted_mean_s for one in verdict.latencies}
        return cls(
            method=method,
            num_nodes=len(run.plan.placement),
            expected=Rates(
                tokens_per_s=verdict.expected_tokens_per_s, tpot_s=latency.get("tpot"), ttft_s=latency.get("ttft")
            ),
            simulated=_measured(validate(simulated)),
            measured=_measured(verdict),
            kept_up=verdict.outcome.is_comparison,
        )


def _measured(verdict: Verdict) -> Rates:
    latency = {one.kind: one.mean_s for one in verdict.latencies}
    return Rates(tokens_per_s=verdict.measured_tokens_per_s, tpot_s=latency.get("tpot"), ttft_s=latency.get("ttft"))


class DemoResult(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.demo/1",
):
    """The plan, and the baselines that this cluster has: the file ``demo.json``."""

    plan: Served
    baselines: tuple[Served, ...] = ()
    verdict: Verdict
    provenance: Provenance = Provenance()


def comparison(result: DemoResult) -> Document:
    """The last screen of a demo."""
    plans = (result.plan, *result.baselines)
    unsound = [_name(one) for one in plans if not one.kept_up]
    return Document(
        kind="demo",
        title="the plan beside baselines of the same cluster, under the same load",
        sections=(
            section(
                "Plans",
                "tokens/s: expected of the settled loop; simulated with the requests that were measured",
                ("plan", ">nodes", ">expected", ">simulated", ">measured", ">measured / simulated"),
                map(_throughput, plans),
            ),
            section(
                "Latency",
                "simulated / measured, means",
                ("plan", ">time per output token", ">time to first token"),
                map(_latency, plans),
            ),
            Section(
                title="What the plan brought",
                lines=tuple(_gain(result.plan, baseline) for baseline in result.baselines),
                is_detail=False,
            ),
        ),
        notes=tuple(
            f"{name}: this machine did not keep up with the devices, so its run is no measurement" for name in unsound
        ),
        provenance=result.provenance,
    )


def _name(one: Served) -> str:
    return "the plan" if one.method == "auto" else one.method


def _throughput(one: Served) -> Row:
    rates = (one.expected.tokens_per_s, one.simulated.tokens_per_s, one.measured.tokens_per_s)
    off = ratio(_quotient(one.measured.tokens_per_s, one.simulated.tokens_per_s))
    return (_name(one), str(one.num_nodes), *map(number, rates), off)


def _latency(one: Served) -> Row:
    return (
        _name(one),
        f"{seconds(one.simulated.tpot_s)} / {seconds(one.measured.tpot_s)}",
        f"{seconds(one.simulated.ttft_s)} / {seconds(one.measured.ttft_s)}",
    )


def _gain(plan: Served, baseline: Served) -> str:
    gains = [
        f"{kind} {TIMES}{ratio(_quotient(ours.tokens_per_s, theirs.tokens_per_s))}"
        for kind, ours, theirs in (
            ("measured", plan.measured, baseline.measured),
            ("simulated", plan.simulated, baseline.simulated),
            ("expected", plan.expected, baseline.expected),
        )
    ]
    return f"over {baseline.method}: {', '.join(gains)}"


def _quotient(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base
