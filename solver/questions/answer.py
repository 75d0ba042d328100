"""The answer to a whole question: several searches where it has a target or is about a change of a cluster."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from helixbench.solver.bounds.latency import bound_of_expected
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.flow.survival import survives
from helixbench.solver.placement.incumbent import simulation_budget
from helixbench.solver.placement.progress import OnProgress
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.checker import require_sound
from helixbench.solver.problem.feasibility import why_infeasible
from helixbench.solver.problem.plan import Infeasible, Plan
from helixbench.solver.questions.assemble import assemble, interrupted
from helixbench.solver.questions.config import SolveConfig
from helixbench.solver.questions.solve import solve_placement
from helixbench.solver.questions.targets import fewest_nodes, most_within_latency
from helixbench.solver.questions.what_if import with_fewest_bytes_moved

AFTER_INTERRUPT_S = 0.1
"""Time limit of each search that is still to come after Ctrl-C: baselines only."""

FREE_SHARE = 0.3
"""Share of the time for the plan that need not survive a loss, of which the price of one that does is taken."""

ROUNDING = 1e-6
"""Relative: differences of expected values that are smaller say nothing."""


@dataclass(frozen=True)
class Answer:
    """The plan that is asked for, or why there is none; and the same for the cluster as it is, where that is asked."""

    plan: Plan | Infeasible
    before: Plan | Infeasible | None = None


def answer(config: SolveConfig, on_progress: OnProgress | None = None) -> Answer:
    """Answer a question about a cluster and, where it is a change of another one, about that one too.

    Each takes the time limit. The second search begins with the first plan, and gives ranges to alike nodes so that the
    least has to be loaded. Ctrl-C in the first ends the second almost at once; after either the second plan's status
    is ``interrupted``.

    Raises:
        InputError: a node with a capacity table that has no memory for any layer.
    """
    if config.before is None:
        return Answer(_plan(config, on_progress))
    before = _plan(config.on(config.before), on_progress)
    if isinstance(before, Infeasible):
        return Answer(_plan(config, on_progress), before)
    if before.is_interrupted:
        config = msgspec.structs.replace(config, time_limit_s=AFTER_INTERRUPT_S)
    there = {node.name for node in config.cluster.nodes}
    start = {name: held for name, held in before.placement.items() if name in there}
    after = _plan(msgspec.structs.replace(config, start=start), on_progress)
    if isinstance(after, Infeasible):
        return Answer(after, before)
    is_interrupted = before.is_interrupted
    try:
        after = _moving_least(config, before, after)
    except KeyboardInterrupt:
        is_interrupted = True
    return Answer(interrupted(after) if is_interrupted else after, before)


def _plan(config: SolveConfig, on_progress: OnProgress | None) -> Plan | Infeasible:
    """The plan for one cluster: of one search, or of the several that a target takes."""
    capacities = config.capacities()
    solve = _Searches(on_progress)
    if not config.has_target:
        found = _with_price(solve, config) if config.survive else solve(config)
    else:
        # Targets compute the least latency and the least nodes of any plan before they search: there has to be one.
        reason = why_infeasible(capacities)
        if reason is not None:
            return Infeasible(reason=reason)
        target = most_within_latency if config.has_latency_limit else fewest_nodes
        found = target(solve, config, capacities)
    return found if isinstance(found, Infeasible) else _with_the_whole_question(capacities, found)


def _with_price(solve: _Searches, config: SolveConfig) -> Plan | Infeasible:
    """The plan that survives a loss, beside what a search without that requirement finds: it takes part of the time."""
    reason = why_infeasible(config.capacities())
    if reason is not None:
        return Infeasible(reason=reason)
    replace = msgspec.structs.replace
    free = solve(replace(config, survive=0, time_limit_s=FREE_SHARE * config.time_limit_s))
    if isinstance(free, Infeasible):
        return free
    found = solve(replace(config, start=free.placement, time_limit_s=(1 - FREE_SHARE) * config.time_limit_s))
    if isinstance(found, Infeasible):
        return found
    predicted, survival = found.predicted, found.predicted.survival
    assert survival is not None, "the plan was made to survive"
    bound = min(predicted.upper_bound_tokens_per_s, free.predicted.upper_bound_tokens_per_s)
    flow, best = predicted.max_flow_tokens_per_s, free.objective_tokens_per_s
    survival = replace(
        survival,
        price_tokens_per_s=max(0.0, best - found.objective_tokens_per_s),
        least_price_tokens_per_s=max(0.0, best - bound),
    )
    predicted = replace(predicted, upper_bound_tokens_per_s=bound, gap=(bound - flow) / flow, survival=survival)
    return replace(found, predicted=predicted)


def _with_the_whole_question(capacities: Capacities, plan: Plan) -> Plan:
    """Add what depends on the whole question: a note on unused pins, and the bound on any plan's expected throughput.

    The bound holds in the long run: what a simulation counted over its windows may be above by chance.
    """
    notes = list(plan.assumptions.notes)
    unused = [f"{name}={held}" for name, held in capacities.pins.items() if name not in plan.placement]
    if unused:
        notes.append(f"pinned, but the plan does not use it: {', '.join(unused)}")
    bound = bound_of_expected(capacities, plan.predicted.upper_bound_tokens_per_s)
    above = plan.predicted.expected[-1].total_tokens_per_s / bound.tokens_per_s - 1
    if above > ROUNDING:
        notes.append(f"expected lies {above:.1%} above its bound: by chance over the simulated windows, or by an error")
    return msgspec.structs.replace(
        plan,
        predicted=msgspec.structs.replace(plan.predicted, bound_of_expected=bound),
        assumptions=msgspec.structs.replace(plan.assumptions, notes=tuple(notes)),
    )


def _moving_least(config: SolveConfig, before: Plan, after: Plan) -> Plan:
    """The plan with alike nodes swapped so that the least has to be loaded, where that costs nothing else."""
    capacities = msgspec.structs.replace(config, concurrency=after.assumptions.concurrency).capacities()
    placement = with_fewest_bytes_moved(capacities, before.placement, after.placement)

    def is_as_good(new: float, old: float) -> bool:
        return new >= old * (1 - ROUNDING)

    flow = after.predicted.max_flow_tokens_per_s
    if placement == after.placement or not is_as_good(max_flow(capacities, placement).tokens_per_s, flow):
        return after
    if config.survive and not survives(capacities, placement):
        return after
    swapped = assemble(
        capacities,
        placement,
        objective=config.objective,
        bound=after.predicted.upper_bound_tokens_per_s,
        facts=after.solver,
        budget=simulation_budget(config.time_limit_s, config.objective),
    )
    if not (
        is_as_good(swapped.predicted.max_flow_tokens_per_s, flow)
        and is_as_good(swapped.objective_tokens_per_s, after.objective_tokens_per_s)
        and config.is_met_by(swapped.predicted.expected[-1])
        and len(swapped.placement) == len(placement)
    ):
        return after
    survival = after.predicted.survival
    if survival is not None and swapped.predicted.survival is not None:
        survival = msgspec.structs.replace(survival, after_loss=swapped.predicted.survival.after_loss)
    predicted = msgspec.structs.replace(swapped.predicted, least_nodes=after.predicted.least_nodes, survival=survival)
    swapped = msgspec.structs.replace(swapped, predicted=predicted)
    require_sound(config.cluster, swapped)
    # The bounds are those of the requests in flight that were asked for; a latency limit may have left fewer.
    return _with_the_whole_question(config.capacities(), swapped)


class _Searches:
    """Searches for one answer. Ctrl-C ends the one that goes, and those that follow almost at once.

    From then on every plan counts as interrupted.
    """

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self._is_interrupted = False

    def __call__(self, config: SolveConfig) -> Plan | Infeasible:
        if self._is_interrupted:
            config = msgspec.structs.replace(config, time_limit_s=AFTER_INTERRUPT_S)
        found = solve_placement(config, self._on_progress)
        if isinstance(found, Infeasible):
            return found
        self._is_interrupted = self._is_interrupted or found.is_interrupted
        return interrupted(found) if self._is_interrupted else found
