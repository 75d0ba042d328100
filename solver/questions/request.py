"""What is asked of the solver, in one record, and its answer: cluster, workload, target, and what may be spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.solver.bounds.latency import bound_of_expected
from helixbench.solver.flow.marginal import objective_value, one_more_in_words, one_more_of_each
from helixbench.solver.flow.max_flow import largest_flow
from helixbench.solver.placement.feasibility import why_infeasible
from helixbench.solver.placement.progress import OnProgress, Progress
from helixbench.solver.placement.search import require_pins, solve_placement
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.checker import require_sound
from helixbench.solver.problem.plan import Expected, Infeasible, LayerRange, OneMore, Plan
from helixbench.solver.problem.question import Objective, Question
from helixbench.solver.problem.workload import Workload
from helixbench.solver.questions.assemble import assemble, interrupted
from helixbench.solver.questions.targets import fewest_nodes, most_within_latency
from helixbench.solver.questions.verdict import fewer_nodes, with_verdicts
from helixbench.solver.questions.what_if import with_fewest_bytes_moved

AFTER_INTERRUPT_S = 0.1
"""Of each search that is still to come after Ctrl-C: baselines only."""

ROUNDING = 1e-6
"""Relative: differences of expected values that are smaller say nothing."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A question and its limits; see ``solve_placement`` for the fields that it has too.

    Attributes:
        max_tpot_s: most seconds for each output token.
        max_ttft_s: most seconds to the first output token.
        min_tokens_per_s: as few nodes as are expected to give this.

    Raises:
        InputError: a field out of range, or two that ask for different plans.
    """

    profile: ClusterProfile
    workload: Workload
    concurrency: int | None = None
    objective: Objective = "throughput"
    method: str = "auto"
    max_tpot_s: float | None = None
    max_ttft_s: float | None = None
    min_tokens_per_s: float | None = None
    partial: bool = True
    pins: Mapping[str, LayerRange] = field(default_factory=dict)
    time_limit_s: float = 60.0
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        limits = (self.max_tpot_s, self.max_ttft_s)
        if any(limit is not None and not limit > 0 for limit in (*limits, self.min_tokens_per_s)):
            raise InputError("--max-tpot-s, --max-ttft-s, --min-tokens-per-s: need more than 0")
        if self.min_tokens_per_s is not None and self.has_latency_limit:
            raise InputError("--min-tokens-per-s and a latency limit ask for two different plans; give one")
        if self.objective == "max-flow" and self.has_target:
            raise InputError(
                "latency and throughput targets are about what is expected; leave out --objective max-flow"
            )
        for name in self.pins:
            if all(node.name != name for node in self.profile.nodes):
                raise InputError(f"--pin {name}: no such node in the cluster that is planned for")

    @property
    def has_latency_limit(self) -> bool:
        """Whether a latency is limited."""
        return self.max_tpot_s is not None or self.max_ttft_s is not None

    @property
    def has_target(self) -> bool:
        """Whether a latency is limited or a throughput is wanted."""
        return self.has_latency_limit or self.min_tokens_per_s is not None

    def is_met_by(self, expected: Expected) -> bool:
        """Whether what is expected keeps every limit; a latency that is not known keeps none."""
        latencies = ((expected.tpot_s, self.max_tpot_s), (expected.ttft_s, self.max_ttft_s))
        if any(limit is not None and (given is None or given > limit) for given, limit in latencies):
            return False
        return self.min_tokens_per_s is None or expected.total_tokens_per_s >= self.min_tokens_per_s


def answer(
    request: PlanRequest, on_progress: OnProgress | None = None, *, start: Mapping[str, LayerRange] | None = None
) -> Plan | Infeasible:
    """The plan that is asked for, or why there is none.

    Args:
        request: the question.
        on_progress: called as each search goes.
        start: a placement that the search begins with; targets, which search several clusters, leave it aside.

    Raises:
        InputError: a pin that no plan can keep, or an option out of range.
    """
    require_pins(request.profile, request.pins)
    capacities = Capacities(request.profile, request.workload, concurrency=request.concurrency, pins=request.pins)
    # Targets ask for the least latency and the least nodes of any plan before they search: there has to be one.
    reason = why_infeasible(capacities) if request.has_target else None
    if reason is not None:
        return Infeasible(reason=reason)
    found = _answer(request, capacities, _Searches(request, on_progress), start)
    return found if isinstance(found, Infeasible) else _beside_the_question(capacities, found)


def _answer(
    request: PlanRequest, capacities: Capacities, solve: _Searches, start: Mapping[str, LayerRange] | None
) -> Plan | Infeasible:
    if request.min_tokens_per_s is not None:
        return fewest_nodes(
            solve,
            request.profile,
            capacities,
            concurrency=request.concurrency,
            wanted=request.min_tokens_per_s,
            seconds=request.time_limit_s,
            partial=request.partial,
        )
    if request.has_latency_limit:
        return most_within_latency(
            solve,
            request.profile,
            capacities,
            concurrency=request.concurrency,
            max_tpot_s=request.max_tpot_s,
            max_ttft_s=request.max_ttft_s,
            seconds=request.time_limit_s,
        )
    return solve(request.profile, request.concurrency, request.time_limit_s, start=start)


def _beside_the_question(capacities: Capacities, plan: Plan) -> Plan:
    """The plan with what only the whole question says: the bound of what is expected, and pins that it leaves aside."""
    unused = [f"{name}={held}" for name, held in capacities.pins.items() if name not in plan.placement]
    if unused:
        note = f"pinned, but the plan does not use it: {', '.join(unused)}"
        assumptions = msgspec.structs.replace(plan.assumptions, notes=(*plan.assumptions.notes, note))
        plan = msgspec.structs.replace(plan, assumptions=assumptions)
    return _with_bound_of_expected(capacities, plan)


def _with_bound_of_expected(capacities: Capacities, plan: Plan) -> Plan:
    """The plan with the proven bound of what any plan can be expected to give with the requests in flight asked for.

    It holds in the long run: what a rollout counted over its windows may be above by chance, and a note says so.
    """
    predicted, assumptions = plan.predicted, plan.assumptions
    bound = bound_of_expected(capacities, predicted.upper_bound_tokens_per_s)
    above = predicted.expected[-1].total_tokens_per_s / bound.tokens_per_s - 1
    if above > ROUNDING:
        note = f"expected lies {above:.1%} above its bound: by chance over the windows followed, or by an error"
        assumptions = msgspec.structs.replace(assumptions, notes=(*assumptions.notes, note))
    predicted = msgspec.structs.replace(predicted, bound_of_expected=bound)
    return msgspec.structs.replace(plan, predicted=predicted, assumptions=assumptions)


def answer_what_if(
    request: PlanRequest, as_it_is: ClusterProfile, on_progress: OnProgress | None = None
) -> tuple[Plan | Infeasible, Plan | Infeasible]:
    """The answers for a cluster as it is and for the request's, each in the time limit.

    The second search begins with the first plan, and gives ranges to alike nodes so that the least has to be loaded.
    Ctrl-C in the first ends the second almost at once; in either it is the second plan's status.
    """
    there = {node.name for node in as_it_is.nodes}
    pins = {name: held for name, held in request.pins.items() if name in there}
    before = answer(dataclasses.replace(request, profile=as_it_is, pins=pins), on_progress)
    if isinstance(before, Infeasible):
        return before, answer(request, on_progress)
    is_interrupted = before.solver.status == "interrupted"
    if is_interrupted:
        request = dataclasses.replace(request, time_limit_s=AFTER_INTERRUPT_S)
    kept = {node.name for node in request.profile.nodes}
    start = {name: held for name, held in before.placement.items() if name in kept}
    after = answer(request, on_progress, start=start)
    if isinstance(after, Infeasible):
        return before, after
    try:
        after = _moving_least(request, before, after)
    except KeyboardInterrupt:
        is_interrupted = True
    return before, interrupted(after) if is_interrupted else after


def _moving_least(request: PlanRequest, before: Plan, after: Plan) -> Plan:
    """The plan with alike nodes swapped so that the least has to be loaded, where that costs nothing else."""
    asked = after.assumptions.concurrency
    capacities = Capacities(request.profile, request.workload, concurrency=asked, pins=request.pins)
    placement = with_fewest_bytes_moved(capacities, before.placement, after.placement)
    question = Question(capacities, request.objective, request.partial)
    least_flow = _max_flow(after) * (1 - ROUNDING)
    if placement == after.placement or largest_flow(question, placement).tokens_per_s < least_flow:
        return after
    swapped = assemble(
        question,
        placement,
        bound=after.predicted.upper_bound_tokens_per_s,
        facts=after.solver,
    )
    swapped = with_verdicts(question, swapped)
    is_as_good = all(value(swapped) >= value(after) * (1 - ROUNDING) for value in (_max_flow, objective_value))
    is_met = request.is_met_by(swapped.predicted.expected[-1])
    if not (is_as_good and is_met) or len(swapped.placement) < len(placement):
        return after
    predicted = msgspec.structs.replace(swapped.predicted, least_nodes=after.predicted.least_nodes)
    swapped = msgspec.structs.replace(swapped, predicted=predicted)
    require_sound(request.profile, swapped)
    # The bounds are those of the requests in flight that were asked for; a latency limit may have left fewer.
    whole = Capacities(request.profile, request.workload, concurrency=request.concurrency, pins=request.pins)
    return _beside_the_question(whole, swapped)


def _max_flow(plan: Plan) -> float:
    return plan.predicted.max_flow_tokens_per_s


def asks_for_one_more(request: PlanRequest, plan: Plan) -> bool:
    """Whether one more node is a question: of a whole search for the most, not of a baseline or a target."""
    return request.method == "auto" and not request.has_target and plan.solver.status != "interrupted"


def with_one_more(request: PlanRequest, plan: Plan, *, seconds: float, on_progress: OnProgress | None = None) -> Plan:
    """The plan with what one more node of each type would add, in numbers and in the words of its bottleneck.

    Ctrl-C ends it with what is known by then.
    """
    predicted, concurrency = plan.predicted, plan.assumptions.concurrency
    if on_progress is not None:
        doing = "what one more node of each type adds"
        on_progress(_at_rest(plan, doing))
    search = _Searches(request, None, is_brief=request.objective == "max-flow")

    def solve(profile: ClusterProfile, time_limit_s: float) -> Plan | Infeasible:
        return search(profile, concurrency, time_limit_s, start=plan.placement)

    found: list[OneMore] = []
    try:
        for more in one_more_of_each(solve, request.profile, plan, seconds=seconds):
            found.append(more)
    except KeyboardInterrupt:
        pass
    words = one_more_in_words(found, request.objective)
    predicted = msgspec.structs.replace(predicted, one_more=tuple(found), bottleneck=(*predicted.bottleneck, *words))
    return msgspec.structs.replace(plan, predicted=predicted)


def with_fewer_nodes(
    request: PlanRequest, plan: Plan, *, seconds: float, on_progress: OnProgress | None = None
) -> Plan:
    """The plan with a note where fewer of its nodes do nearly as well.

    Raises:
        KeyboardInterrupt: a search of its own was ended by Ctrl-C, and others that were to follow are not wanted.
    """
    if len(plan.placement) < 2 or any(note.startswith("not worth") for note in plan.assumptions.notes):
        return plan
    if on_progress is not None:
        doing = "whether fewer nodes do as well"
        on_progress(_at_rest(plan, doing))
    search, concurrency = (
        _Searches(request, None, is_brief=request.objective == "max-flow"),
        plan.assumptions.concurrency,
    )
    note = fewer_nodes(lambda profile, s: search(profile, concurrency, s), request.profile, plan, seconds=seconds)
    if search.is_interrupted:
        raise KeyboardInterrupt
    if note is None:
        return plan
    assumptions = msgspec.structs.replace(plan.assumptions, notes=(*plan.assumptions.notes, note))
    return msgspec.structs.replace(plan, assumptions=assumptions)


def _at_rest(plan: Plan, doing: str) -> Progress:
    """Where a search is that begins with the plan at hand."""
    predicted = plan.predicted
    expected = objective_value(plan) if plan.assumptions.objective == "throughput" else None
    return Progress(0.0, predicted.max_flow_tokens_per_s, predicted.upper_bound_tokens_per_s, doing, expected)


class _Searches:
    """Searches under a request's rules. Ctrl-C ends the one that goes, and those that follow almost at once.

    From then on every answer counts as interrupted.
    """

    def __init__(self, request: PlanRequest, on_progress: OnProgress | None, *, is_brief: bool = False) -> None:
        self._request, self._is_brief = request, is_brief
        self._on_progress = on_progress
        self.is_interrupted = False

    def __call__(
        self,
        profile: ClusterProfile,
        concurrency: int | None,
        seconds: float,
        *,
        start: Mapping[str, LayerRange] | None = None,
    ) -> Plan | Infeasible:
        request = self._request
        there = {node.name for node in profile.nodes}
        found = solve_placement(
            profile,
            request.workload,
            concurrency=concurrency,
            objective=request.objective,
            method=request.method,
            time_limit_s=AFTER_INTERRUPT_S if self.is_interrupted else seconds,
            threads=request.threads,
            seed=request.seed,
            is_brief=self._is_brief,
            partial=request.partial,
            pins={name: held for name, held in request.pins.items() if name in there},
            start=start,
            on_progress=self._on_progress,
        )
        if isinstance(found, Infeasible):
            return found
        self.is_interrupted = self.is_interrupted or found.solver.status == "interrupted"
        return interrupted(found) if self.is_interrupted else found
