"""What changed between two records of one kind, and whether it is more than noise. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile, Node
from helixbench.profiler.cost.model import BatchShape
from helixbench.profiler.profile_diff import cost_ratios, lasting_facts
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.render.text import bit_rate, link_name, number, percent, ratio, seconds, size
from helixbench.reports.verdict.intervals import CONFIDENCE, t_quantile
from helixbench.reports.verdict.metrics import IS_HIGHER_BETTER, batches_of, metrics_of
from helixbench.reports.verdict.validate import validate
from helixbench.reports.verdict.verdict import Interval
from helixbench.solver.problem.plan import Plan

Judgement = Literal["better", "worse", "within noise", "changed", "unchanged"]
Kind = Literal["profile", "plan", "run"]
Record = ClusterProfile | Plan | RunLog

# Stage times of two profiles are compared at this batch: some sequences decoding, none prefilling.
REFERENCE_DECODES = 8
REFERENCE_CONTEXT_TOKENS = 128
EXACT = 1e-9


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One quantity in both records, as text and, where it is a number, as new / base with an interval.

    ``judgement`` is ``changed`` where the noise is not known or no direction is better.
    """

    name: str
    base: str
    new: str
    judgement: Judgement
    ratio: float | None = None
    interval: Interval | None = None


class Comparison(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.comparison/1",
):
    """All that was compared; ``notes`` say what makes the two hard to compare."""

    kind: Kind
    base: str
    new: str
    notes: tuple[str, ...]
    changes: tuple[Change, ...]


def compare(base: Record, new: Record, *, base_name: str = "base", new_name: str = "new") -> Comparison:
    """Compare two profiles, two plans or two runs.

    Raises:
        InputError: two records of different kinds.
    """
    if isinstance(base, RunLog) and isinstance(new, RunLog):
        return _comparison("run", base_name, new_name, _run_notes(base, new), _run_changes(base, new))
    if isinstance(base, Plan) and isinstance(new, Plan):
        return _comparison("plan", base_name, new_name, _plan_notes(base, new), _plan_changes(base, new))
    if isinstance(base, ClusterProfile) and isinstance(new, ClusterProfile):
        return _comparison("profile", base_name, new_name, _profile_notes(base, new), _profile_changes(base, new))
    raise InputError(f"{base_name} and {new_name}: two records of different kinds; compare like with like")


def _comparison(kind: Kind, base: str, new: str, notes: Iterable[str], changes: Iterable[Change]) -> Comparison:
    return Comparison(kind=kind, base=base, new=new, notes=tuple(notes), changes=tuple(changes))


def _run_notes(base: RunLog, new: RunLog) -> list[str]:
    notes = ["one run each: intervals hold the noise inside a run, not that between runs"]
    if base.simulated and new.simulated:
        notes.append("both runs are simulated: no hardware ran")
    if base.plan != new.plan:
        notes.append("two plans were run")
    for name in ("concurrency", "routing", "testbed", "simulated"):
        if getattr(base, name) != getattr(new, name):
            notes.append(f"{name} differs: {getattr(base, name)} and {getattr(new, name)}")
    if base.workload != new.workload:
        notes.append(f"the workload differs: {base.workload.source} and {new.workload.source}")
    return notes


def _run_changes(base: RunLog, new: RunLog) -> Iterable[Change]:
    of_base, of_new = metrics_of(base), metrics_of(new)
    parts_base, parts_new = batches_of(base), batches_of(new)
    for name, is_higher_better in IS_HIGHER_BETTER.items():
        if name in of_base and name in of_new:
            yield _quantity(
                name,
                of_base[name],
                of_new[name],
                is_higher_better=is_higher_better,
                interval=_ratio_interval(parts_base.get(name, ()), parts_new.get(name, ())),
            )
    verdict_base, verdict_new = validate(base), validate(new)
    yield _text("outcome", verdict_base.outcome, verdict_new.outcome)
    yield _text("measured / expected", ratio(verdict_base.ratio_to_expected), ratio(verdict_new.ratio_to_expected))
    nodes = {node.name: node for node in verdict_base.nodes}
    for node in verdict_new.nodes:
        before = nodes.get(node.name)
        if before is not None and before.measured_iteration_s and node.measured_iteration_s:
            name = f"{node.name}: iteration_s"
            yield _quantity(name, before.measured_iteration_s, node.measured_iteration_s, is_higher_better=False)
            yield _text(f"{node.name}: busy", percent(before.measured_busy), percent(node.measured_busy))


def _plan_notes(base: Plan, new: Plan) -> list[str]:
    notes = []
    if base.cluster_digest != new.cluster_digest:
        notes.append("made for two cluster profiles")
    if base.assumptions.workload != new.assumptions.workload:
        notes.append(f"for two workloads: {base.assumptions.workload.source}, {new.assumptions.workload.source}")
    if base.assumptions.objective != new.assumptions.objective:
        notes.append(f"two objectives: {base.assumptions.objective}, {new.assumptions.objective}")
    return notes


def _plan_changes(base: Plan, new: Plan) -> Iterable[Change]:
    """A plan's numbers are computed, so there is no noise in them."""
    before, after = base.predicted, new.predicted
    a, b = before.max_flow_tokens_per_s, after.max_flow_tokens_per_s
    yield _quantity("max_flow_tokens_per_s", a, b, is_higher_better=True, interval=_exact(a, b))
    # A higher bound may be a better cluster or a weaker proof: neither way is better.
    bounds = (before.upper_bound_tokens_per_s, after.upper_bound_tokens_per_s)
    yield _quantity("upper_bound_tokens_per_s", *bounds, is_higher_better=True)
    entries = {entry.concurrency: entry for entry in before.expected}
    for entry in after.expected:
        old = entries.get(entry.concurrency)
        if old is not None:
            a, b = old.total_tokens_per_s, entry.total_tokens_per_s
            yield _quantity(f"expected at {entry.concurrency}", a, b, is_higher_better=True, interval=_exact(a, b))
    yield _text("gap", percent(before.gap, 1), percent(after.gap, 1))
    yield _text("bottleneck", "; ".join(before.bottleneck), "; ".join(after.bottleneck))
    for name in sorted(base.placement.keys() | new.placement.keys()):
        held = (base.placement.get(name), new.placement.get(name))
        yield _text(f"layers of {name}", str(held[0] or "not used"), str(held[1] or "not used"))
    yield _text("solver", f"{base.solver.method}: {base.solver.status}", f"{new.solver.method}: {new.solver.status}")


def _profile_notes(base: ClusterProfile, new: ClusterProfile) -> list[str]:
    notes = []
    if base.model != new.model:
        notes.append(f"two models: {base.model.name} and {new.model.name}")
    if base.testbed != new.testbed:
        notes.append(f"testbed differs: {base.testbed or 'none'} and {new.testbed or 'none'}")
    return notes


def _profile_changes(base: ClusterProfile, new: ClusterProfile) -> Iterable[Change]:
    before, after = ({node.name: node for node in profile.nodes} for profile in (base, new))
    for name in sorted(before.keys() | after.keys()):
        if name in before and name in after:
            yield from _node_changes(before[name], after[name])
        else:
            yield _text(name, "there" if name in before else "not there", "there" if name in after else "not there")
    pairs = {(link.src, link.dst) for profile in (base, new) for link in profile.links}
    for src, dst in sorted(pairs):
        a, b = base.link(src, dst), new.link(src, dst)
        if a is None or b is None:
            yield _text(link_name(src, dst), "connected" if a else "not there", "connected" if b else "not there")
            continue
        name = link_name(src, dst)
        yield _quantity(
            f"{name}: bandwidth",
            a.bandwidth_bytes_per_s,
            b.bandwidth_bytes_per_s,
            is_higher_better=True,
            texts=(bit_rate(a.bandwidth_bytes_per_s), bit_rate(b.bandwidth_bytes_per_s)),
        )
        yield _text(f"{name}: latency", seconds(a.latency_s), seconds(b.latency_s))


def _node_changes(base: Node, new: Node) -> Iterable[Change]:
    name = base.name
    yield _text(f"{name}: device", base.device.name, new.device.name)
    yield _text(f"{name}: memory", size(base.device.memory_bytes), size(new.device.memory_bytes))
    yield _text(f"{name}: layers that fit", str(base.max_layers), str(new.max_layers))
    for fact in lasting_facts(base, new):
        yield _text(
            f"{name}: {fact}", str(base.device.facts.get(fact, "none")), str(new.device.facts.get(fact, "none"))
        )
    if base.cost is not None and new.cost is not None:
        a, b = (_reference_time_s(node, min(base.max_layers, new.max_layers)) for node in (base, new))
        noise = math.hypot(base.cost.held_out_error_p90, new.cost.held_out_error_p90)
        yield _quantity(
            f"{name}: time of {REFERENCE_DECODES} decodes",
            a,
            b,
            is_higher_better=False,
            interval=Interval(b / a / (1 + noise), b / a * (1 + noise)),
            texts=(seconds(a), seconds(b)),
        )
        for kind, found in cost_ratios(base.cost, new.cost).items():
            yield _quantity(
                f"{name}: time of {kind} batches",
                1.0,
                found.ratio,
                is_higher_better=False,
                interval=Interval(found.low, found.high),
                texts=("1", f"{found.ratio:.3f}"),
            )
    table_a, table_b = base.capacity_tokens_per_s, new.capacity_tokens_per_s
    if table_a and table_b:
        a, b = table_a[0], table_b[0]
        yield _quantity(f"{name}: capacity of one layer", a, b, is_higher_better=True, interval=_exact(a, b))


def _reference_time_s(node: Node, num_layers: int) -> float:
    assert node.cost is not None
    batch = BatchShape(
        decode_tokens=REFERENCE_DECODES,
        decode_context_tokens=REFERENCE_DECODES * REFERENCE_CONTEXT_TOKENS,
        sampled_tokens=REFERENCE_DECODES,
    )
    return node.cost.stage.time_s(num_layers=num_layers, batch=batch, first=False, last=False)


def _quantity(
    name: str,
    base: float,
    new: float,
    *,
    is_higher_better: bool,
    interval: Interval | None = None,
    texts: tuple[str, str] | None = None,
) -> Change:
    texts = texts or (
        (seconds(base), seconds(new)) if name.endswith("_s") and "per_s" not in name else (number(base), number(new))
    )
    found = new / base if base else None
    return Change(
        name=name,
        base=texts[0],
        new=texts[1],
        judgement=_judge(found, interval, is_higher_better=is_higher_better),
        ratio=found,
        interval=interval,
    )


def _judge(found: float | None, interval: Interval | None, *, is_higher_better: bool) -> Judgement:
    if found is not None and abs(found - 1) <= EXACT:
        return "unchanged"
    if interval is None:
        return "changed"
    if interval.low <= 1 <= interval.high:
        return "within noise"
    return "better" if (interval.low > 1) == is_higher_better else "worse"


def _text(name: str, base: str, new: str) -> Change:
    return Change(name=name, base=base, new=new, judgement="unchanged" if base == new else "changed")


def _exact(base: float, new: float) -> Interval | None:
    return Interval(new / base, new / base) if base else None


def _ratio_interval(base: Sequence[float], new: Sequence[float]) -> Interval | None:
    """95 % interval of mean(new) / mean(base) from batch means, by Welch's t on the relative standard errors."""
    if len(base) < 2 or len(new) < 2 or min(*base, *new) <= 0:
        return None
    parts = [(_mean(values), _relative_variance(values), len(values) - 1) for values in (base, new)]
    variance = parts[0][1] + parts[1][1]
    found = parts[1][0] / parts[0][0]
    if variance == 0:
        return Interval(found, found)
    degrees = variance**2 / sum(part[1] ** 2 / part[2] for part in parts if part[1])
    half = t_quantile(max(1, math.floor(degrees)), confidence=CONFIDENCE) * math.sqrt(variance)
    return Interval(found * math.exp(-half), found * math.exp(half))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _relative_variance(values: Sequence[float]) -> float:
    """Squared standard error of the mean, over the squared mean."""
    center, n = _mean(values), len(values)
    return math.fsum((value - center) ** 2 for value in values) / (n - 1) / n / center**2
