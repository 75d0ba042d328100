"""Plans under a target: most throughput within a latency, or fewest nodes for a throughput.

Bounds stay those of the whole question: of all nodes, and of as many requests in flight as were asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set

from msgspec.structs import replace

from helixbench.solver.bounds.latency import least_nodes, least_round_s, least_ttft_s
from helixbench.solver.problem.capacity import Capacities, admitted_requests
from helixbench.solver.problem.plan import Expected, Infeasible, Plan
from helixbench.solver.questions.config import SolveConfig
from helixbench.solver.questions.what_if import without_nodes

MOST_TRIES = 6
"""Numbers in flight that are tried between one whose plan keeps the limits and one whose plan does not."""

Solve = Callable[[SolveConfig], Plan | Infeasible]
"""One search, whatever the targets."""


def most_within_latency(solve: Solve, config: SolveConfig, capacities: Capacities) -> Plan | Infeasible:
    """The plan with the most expected throughput whose latency is within the limits.

    Fewer requests in flight wait less, so the number in flight is lowered by halves from what is asked for (or from the
    most that a first plan expects) until a plan keeps the limits, and raised again by bisection in the time that is
    left. Where one token alone takes longer through any placement, no plan can: that is proven without a search.
    """
    for limit_s, least_s, what in (
        (config.max_tpot_s, least_round_s(capacities), "per output token"),
        (config.max_ttft_s, least_ttft_s(capacities), "to the first output token"),
    ):
        if limit_s is not None and least_s > limit_s:
            return Infeasible(
                reason=f"no plan can keep {_milliseconds(limit_s)} {what}: alone in the cluster a token takes "
                f"{_milliseconds(least_s)} through the {capacities.model.num_layers} layers at the least"
            )
    began_s = time.perf_counter()
    found = solve(replace(config, time_limit_s=config.time_limit_s / 2))
    bound = found.predicted.upper_bound_tokens_per_s if isinstance(found, Plan) else 0.0
    tried: list[Expected] = []
    failed: set[int] = set()
    left = config.time_limit_s / 2
    while isinstance(found, Plan):
        *_, asked = steps = found.predicted.expected
        if config.is_met_by(asked):
            more = _more_in_flight(
                solve,
                config,
                found,
                tried=[step.concurrency for step in tried],
                doubtful=failed,
                seconds=config.time_limit_s - (time.perf_counter() - began_s),
            )
            return _bounded(more, bound)
        tried.append(asked)
        failed.update(step.concurrency for step in steps if not config.is_met_by(step))
        # A plan made for many requests often keeps the limits with fewer: go on from the largest step that does.
        kept = [step.concurrency for step in steps if config.is_met_by(step)]
        number = max(kept) if kept else asked.concurrency // 2
        if number < 1:
            break
        left /= 2
        found = solve(replace(config, concurrency=number, time_limit_s=max(1.0, left)))
    if isinstance(found, Infeasible):
        return found
    best = min(tried, key=lambda step: step.tpot_s or 0.0)
    return Infeasible(
        reason=(
            f"no plan found keeps the latency asked for: with {best.concurrency} in flight the best has "
            f"{_milliseconds(best.tpot_s)} per output token and {_milliseconds(best.ttft_s)} to the first"
        )
    )


def _more_in_flight(
    solve: Solve, config: SolveConfig, best: Plan, *, tried: Sequence[int], doubtful: Set[int], seconds: float
) -> Plan:
    """The best of this plan and of others that keep the limits with more in flight, up to what was tried in vain.

    ``doubtful`` are numbers at which a plan made for more in flight does not keep them: one made for them may.
    """
    end_s = time.perf_counter() + seconds
    low = best.predicted.expected[-1].concurrency
    high = min((number for number in tried if number > low), default=low)
    for left in range(MOST_TRIES, 0, -1):
        seconds = end_s - time.perf_counter()
        if high - low < 2 or seconds <= 0 or best.is_interrupted:
            break
        number = min((number for number in doubtful if low < number < high), default=(low + high) // 2)
        found = solve(replace(config, concurrency=number, time_limit_s=seconds / left, start=best.placement))
        if isinstance(found, Plan) and found.is_interrupted:
            break
        if isinstance(found, Plan) and config.is_met_by(found.predicted.expected[-1]):
            low, best = number, max(best, found, key=_throughput)
        else:
            high = number
    return best


def _throughput(plan: Plan) -> float:
    return plan.predicted.expected[-1].total_tokens_per_s


def fewest_nodes(solve: Solve, config: SolveConfig, capacities: Capacities) -> Plan | Infeasible:
    """A plan of few nodes that is expected to give the tokens/s asked for: bisection over the nodes that do most work.

    That fewer nodes give less is assumed, not proven; ``least_nodes`` of the plan is.
    """
    wanted = config.min_tokens_per_s
    assert wanted is not None, "a target of its own"
    least = least_nodes(capacities, wanted)
    if least > len(capacities.nodes):
        return Infeasible(reason=f"no plan can give {wanted:.1f} tokens/s: all nodes together do not do that much work")
    best = solve(replace(config, time_limit_s=config.time_limit_s / 3))
    if isinstance(best, Infeasible):
        return best
    bound = best.predicted.upper_bound_tokens_per_s
    if not config.is_met_by(best.predicted.expected[-1]):
        given = _throughput(best)
        return Infeasible(reason=f"all nodes together are expected to give {given:.1f} of {wanted:.1f} tokens/s")
    order = _by_work(capacities)
    low, high = least, len(best.placement)  # the plan at hand shows that `high` nodes are enough
    seconds = config.time_limit_s * 2 / 3 / max(1, high.bit_length())
    while low < high:
        count = (low + high) // 2
        fewer = config.on(without_nodes(config.cluster, order[count:]))
        found = solve(replace(fewer, time_limit_s=seconds))
        if isinstance(found, Plan) and config.is_met_by(found.predicted.expected[-1]):
            best, high = found, min(count, len(found.placement))
        else:
            low = count + 1
    best = _bounded(best, bound)
    return replace(best, predicted=replace(best.predicted, least_nodes=least))


def _bounded(plan: Plan, bound: float) -> Plan:
    """The plan beside the bound of the question, not that of the fewer nodes or requests that it was found with."""
    flow = plan.predicted.max_flow_tokens_per_s
    bound = max(bound, flow)
    predicted = replace(plan.predicted, upper_bound_tokens_per_s=bound, gap=(bound - flow) / flow)
    return replace(plan, predicted=predicted)


def _by_work(capacities: Capacities) -> Sequence[str]:
    """Nodes by layers x tokens/s at half of what they hold, with room for KV cache to break ties; most first."""

    def work(name: str) -> tuple[float, float]:
        held = capacities.middle(max(1, capacities.max_layers(name) // 2))
        if not capacities.can_hold(name, held):
            return 0.0, 0.0
        return held.num_layers * capacities.tokens_per_s(name, held), admitted_requests(capacities, name, held)

    return sorted(capacities.nodes, key=work, reverse=True)


def _milliseconds(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else f"{seconds * 1000:.1f} ms"
