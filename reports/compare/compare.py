"""Compare two runs, two plans or two cluster profiles. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.compare.change import Change, Comparison, computed, quantity, statement
from helixbench.reports.compare.profiles import profile_changes, profile_notes
from helixbench.reports.formatting import percent, ratio, seconds
from helixbench.reports.loading import Record
from helixbench.reports.verdict.intervals import CONFIDENCE, t_quantile
from helixbench.reports.verdict.run_metrics import IS_HIGHER_BETTER, batches_of, metrics_of
from helixbench.reports.verdict.validate import validate
from helixbench.reports.verdict.verdict import Interval
from helixbench.solver.problem.plan import Plan


def compare(base: Record, new: Record, *, base_name: str = "base", new_name: str = "new") -> Comparison:
    """All differences between two records of one kind.

    Raises:
        InputError: the records are of different kinds.
    """
    kind: Literal["cluster", "plan", "run"]
    notes: Iterable[str]
    changes: Iterable[Change]
    if isinstance(base, RunLog) and isinstance(new, RunLog):
        kind, notes, changes = "run", _run_notes(base, new), _run_changes(base, new)
    elif isinstance(base, Plan) and isinstance(new, Plan):
        kind, notes, changes = "plan", _plan_notes(base, new), _plan_changes(base, new)
    elif isinstance(base, ClusterProfile) and isinstance(new, ClusterProfile):
        kind, notes, changes = "cluster", profile_notes(base, new), profile_changes(base, new)
    else:
        raise InputError(f"{base_name} and {new_name}: records of different kinds cannot be compared")
    return Comparison(kind=kind, base=base_name, new=new_name, notes=tuple(notes), changes=tuple(changes))


def _run_notes(base: RunLog, new: RunLog) -> Iterator[str]:
    yield "one run each: intervals cover the noise within a run, not between runs"
    simulated = [side for side, run in (("base", base), ("new", new)) if run.simulated]
    if simulated:
        yield f"{' and '.join(simulated)} {'is' if len(simulated) == 1 else 'are'} simulated: no hardware ran"
    if base.plan != new.plan:
        yield "the runs served different plans"
    for name in ("concurrency", "routing", "testbed"):
        if getattr(base, name) != getattr(new, name):
            yield f"{name} differs: {getattr(base, name)} and {getattr(new, name)}"
    if base.workload != new.workload:
        yield f"the workload differs: {base.workload.source} and {new.workload.source}"


def _run_changes(base: RunLog, new: RunLog) -> Iterator[Change]:
    of_base, of_new = metrics_of(base), metrics_of(new)
    means_base, means_new = batches_of(base), batches_of(new)
    for name, is_higher_better in IS_HIGHER_BETTER.items():
        if name in of_base and name in of_new:
            interval = _ratio_interval(means_base.get(name, ()), means_new.get(name, ()))
            yield quantity(name, of_base[name], of_new[name], is_higher_better=is_higher_better, interval=interval)
    before, after = validate(base), validate(new)
    yield statement("outcome", before.outcome, after.outcome)
    yield statement("measured / expected", ratio(before.ratio_to_expected), ratio(after.ratio_to_expected))
    nodes = {node.name: node for node in before.nodes}
    for node in after.nodes:
        old = nodes.get(node.name)
        if old is not None and old.measured_iteration_s and node.measured_iteration_s:
            times = old.measured_iteration_s, node.measured_iteration_s
            texts = seconds(times[0]), seconds(times[1])
            yield quantity(f"{node.name}: iteration", *times, is_higher_better=False, texts=texts)
            yield statement(f"{node.name}: busy", percent(old.measured_busy), percent(node.measured_busy))


def _plan_notes(base: Plan, new: Plan) -> Iterator[str]:
    if base.cluster_digest != new.cluster_digest:
        yield "the plans are for different cluster profiles"
    if base.assumptions.workload != new.assumptions.workload:
        yield f"the workload differs: {base.assumptions.workload.source} and {new.assumptions.workload.source}"
    if base.assumptions.objective != new.assumptions.objective:
        yield f"the objective differs: {base.assumptions.objective} and {new.assumptions.objective}"


def _plan_changes(base: Plan, new: Plan) -> Iterator[Change]:
    """A plan's numbers are computed, so they have no noise."""
    before, after = base.predicted, new.predicted
    yield computed("max_flow_tokens_per_s", before.max_flow_tokens_per_s, after.max_flow_tokens_per_s)
    # A higher bound may mean a better cluster or a weaker proof, so it is neither better nor worse.
    bounds = (before.upper_bound_tokens_per_s, after.upper_bound_tokens_per_s)
    yield quantity("upper_bound_tokens_per_s", *bounds, is_higher_better=True)
    entries = {entry.concurrency: entry.total_tokens_per_s for entry in before.expected}
    for entry in after.expected:
        if entry.concurrency in entries:
            name = f"expected at concurrency {entry.concurrency}"
            yield computed(name, entries[entry.concurrency], entry.total_tokens_per_s)
    yield statement("gap", percent(before.gap, 1), percent(after.gap, 1))
    yield statement("bottleneck", "; ".join(before.bottleneck), "; ".join(after.bottleneck))
    for name in sorted(base.placement.keys() | new.placement.keys()):
        yield statement(f"layers of {name}", base.placement.get(name), new.placement.get(name))
    yield statement("solver", *(f"{plan.solver.method}: {plan.solver.status}" for plan in (base, new)))


def _ratio_interval(base: Sequence[float], new: Sequence[float]) -> Interval | None:
    """95 % interval of mean(new) / mean(base) from batch means.

    The logarithm of the ratio has about the sum of both squared relative standard errors as its variance; Welch's
    formula gives the degrees of freedom.
    """
    if len(base) < 2 or len(new) < 2 or min(*base, *new) <= 0:
        return None
    variances = [_relative_variance(values) for values in (base, new)]
    ratio_of_means = _mean(new) / _mean(base)
    variance = math.fsum(variances)
    if variance == 0:
        return Interval(ratio_of_means, ratio_of_means)
    degrees = variance**2 / sum(v**2 / (len(values) - 1) for v, values in zip(variances, (base, new), strict=True))
    half = t_quantile(max(1, math.floor(degrees)), confidence=CONFIDENCE) * math.sqrt(variance)
    return Interval(ratio_of_means * math.exp(-half), ratio_of_means * math.exp(half))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _relative_variance(values: Sequence[float]) -> float:
    """Squared standard error of the mean, over the squared mean."""
    center, n = _mean(values), len(values)
    return math.fsum((value - center) ** 2 for value in values) / (n - 1) / n / center**2
