"""Changes between two records of one kind, and whether each is more than noise. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.compare.changes import Change, exact, quantity, text
from helixbench.reports.compare.profiles import profile_changes, profile_notes
from helixbench.reports.render.text import percent, ratio
from helixbench.reports.verdict.intervals import CONFIDENCE, t_quantile
from helixbench.reports.verdict.metrics import IS_HIGHER_BETTER, batches_of, metrics_of
from helixbench.reports.verdict.validate import validate
from helixbench.reports.verdict.verdict import Interval
from helixbench.solver.problem.plan import Plan

Kind = Literal["profile", "plan", "run"]
Record = ClusterProfile | Plan | RunLog


class Comparison(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.comparison/1",
):
    """All that was compared; ``notes`` name what makes the two hard to compare."""

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
        return _comparison("profile", base_name, new_name, profile_notes(base, new), profile_changes(base, new))
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
            yield quantity(
                name,
                of_base[name],
                of_new[name],
                is_higher_better=is_higher_better,
                interval=_ratio_interval(parts_base.get(name, ()), parts_new.get(name, ())),
            )
    verdict_base, verdict_new = validate(base), validate(new)
    yield text("outcome", verdict_base.outcome, verdict_new.outcome)
    yield text("measured / expected", ratio(verdict_base.ratio_to_expected), ratio(verdict_new.ratio_to_expected))
    nodes = {node.name: node for node in verdict_base.nodes}
    for node in verdict_new.nodes:
        before = nodes.get(node.name)
        if before is not None and before.measured_iteration_s and node.measured_iteration_s:
            name = f"{node.name}: iteration_s"
            yield quantity(name, before.measured_iteration_s, node.measured_iteration_s, is_higher_better=False)
            yield text(f"{node.name}: busy", percent(before.measured_busy), percent(node.measured_busy))


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
    yield quantity("max_flow_tokens_per_s", a, b, is_higher_better=True, interval=exact(a, b))
    # A higher bound may be a better cluster or a weaker proof: neither way is better.
    bounds = (before.upper_bound_tokens_per_s, after.upper_bound_tokens_per_s)
    yield quantity("upper_bound_tokens_per_s", *bounds, is_higher_better=True)
    entries = {entry.concurrency: entry for entry in before.expected}
    for entry in after.expected:
        old = entries.get(entry.concurrency)
        if old is not None:
            a, b = old.total_tokens_per_s, entry.total_tokens_per_s
            yield quantity(f"expected at {entry.concurrency}", a, b, is_higher_better=True, interval=exact(a, b))
    yield text("gap", percent(before.gap, 1), percent(after.gap, 1))
    yield text("bottleneck", "; ".join(before.bottleneck), "; ".join(after.bottleneck))
    for name in sorted(base.placement.keys() | new.placement.keys()):
        held = (base.placement.get(name), new.placement.get(name))
        yield text(f"layers of {name}", str(held[0] or "not used"), str(held[1] or "not used"))
    yield text("solver", f"{base.solver.method}: {base.solver.status}", f"{new.solver.method}: {new.solver.status}")


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
