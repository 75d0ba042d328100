"""Plans under a target: most throughput within a latency, or fewest nodes for a throughput.

Bounds stay those of the whole question: of all nodes, and of as many requests in flight as were asked for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Set
from typing import Protocol

import msgspec

from helixbench.profiler.cluster import ClusterProfile
from helixbench.solver.bounds.latency import least_nodes, least_round_s, least_ttft_s
from helixbench.solver.problem.capacity import Capacities, admitted_requests
from helixbench.solver.problem.plan import Expected, Infeasible, LayerRange, Plan
from helixbench.solver.questions.what_if import without_nodes

MOST_TRIES = 6
"""Numbers in flight that are tried between one whose plan keeps the limits and one whose plan does not."""


class Solve(Protocol):
    """(cluster, requests in flight, seconds) -> answer; everything else of the question is settled."""

    def __call__(
        self,
        profile: ClusterProfile,
        concurrency: int | None,
        seconds: float,
        /,
        *,
        start: Mapping[str, LayerRange] | None = None,
    ) -> Plan | Infeasible:
        """Search that cluster with so many in flight; it may begin with a placement."""


def most_within_latency(
    solve: Solve,
    profile: ClusterProfile,
    capacities: Capacities,
    *,
    concurrency: int | None,
    max_tpot_s: float | None,
    max_ttft_s: float | None,
    seconds: float,
) -> Plan | Infeasible:
    """The plan with the most expected throughput whose latency is within the limits.

    Fewer requests in flight wait less, so the number in flight is lowered by halves from what is asked for (or from the
    most that a first plan expects) until a plan keeps the limits, and raised again by bisection in the time that is
    left. Where one token alone takes longer through any placement, no plan can: that is proven without a search.
    """
    for limit_s, least_s, what in (
        (max_tpot_s, least_round_s(capacities), "per output token"),
        (max_ttft_s, least_ttft_s(capacities), "to the first output token"),
    ):
        if limit_s is not None and least_s > limit_s:
            return Infeasible(
                reason=f"no plan can keep {_milliseconds(limit_s)} {what}: alone in the cluster a token takes "
                f"{_milliseconds(least_s)} through the {capacities.model.num_layers} layers at the least"
            )
    began_s = time.perf_counter()
    answer = solve(profile, concurrency, seconds / 2)
    bound = answer.predicted.upper_bound_tokens_per_s if isinstance(answer, Plan) else 0.0
    tried: list[Expected] = []
    failed: set[int] = set()
    left, number = seconds / 2, 0
    while isinstance(answer, Plan):
        asked = answer.predicted.expected[-1]
        if _keeps(asked, max_tpot_s, max_ttft_s):
            more = _more_in_flight(
                solve,
                profile,
                answer,
                tried=[step.concurrency for step in tried],
                doubtful=failed,
                max_tpot_s=max_tpot_s,
                max_ttft_s=max_ttft_s,
                seconds=seconds - (time.perf_counter() - began_s),
            )
            return _bounded(more, bound)
        tried.append(asked)
        failed.update(
            step.concurrency for step in answer.predicted.expected if not _keeps(step, max_tpot_s, max_ttft_s)
        )
        # A plan made for many requests often keeps the limits with fewer: go on from the largest step that does.
        kept = [step.concurrency for step in answer.predicted.expected if _keeps(step, max_tpot_s, max_ttft_s)]
        number = max(kept) if kept else asked.concurrency // 2
        if number < 1:
            break
        left /= 2
        answer = solve(profile, number, max(1.0, left))
    if isinstance(answer, Infeasible):
        return answer
    best = min(tried, key=lambda step: step.tpot_s or 0.0)
    return Infeasible(
        reason=(
            f"no plan found keeps the latency asked for: with {best.concurrency} in flight the best has "
            f"{_milliseconds(best.tpot_s)} per output token and {_milliseconds(best.ttft_s)} to the first"
        )
    )


def _more_in_flight(
    solve: Solve,
    profile: ClusterProfile,
    best: Plan,
    *,
    tried: Sequence[int],
    doubtful: Set[int],
    max_tpot_s: float | None,
    max_ttft_s: float | None,
    seconds: float,
) -> Plan:
    """The best of this plan and of others that keep the limits with more in flight, up to what was tried in vain.

    ``doubtful`` are numbers at which a plan made for more in flight does not keep them: one made for them may.
    """
    end_s = time.perf_counter() + seconds
    low = best.predicted.expected[-1].concurrency
    high = min((number for number in tried if number > low), default=low)
    for left in range(MOST_TRIES, 0, -1):
        seconds = end_s - time.perf_counter()
        if high - low < 2 or seconds <= 0 or best.solver.status == "interrupted":
            break
        number = min((number for number in doubtful if low < number < high), default=(low + high) // 2)
        answer = solve(profile, number, seconds / left, start=best.placement)
        if isinstance(answer, Plan) and answer.solver.status == "interrupted":
            break
        if isinstance(answer, Plan) and _keeps(answer.predicted.expected[-1], max_tpot_s, max_ttft_s):
            low, best = number, max(best, answer, key=_throughput)
        else:
            high = number
    return best


def _throughput(plan: Plan) -> float:
    return plan.predicted.expected[-1].total_tokens_per_s


def fewest_nodes(
    solve: Solve,
    profile: ClusterProfile,
    capacities: Capacities,
    *,
    concurrency: int | None,
    wanted: float,
    seconds: float,
    partial: bool,
) -> Plan | Infeasible:
    """A plan of few nodes that is expected to give ``wanted`` tokens/s: bisection over the nodes that do most work."""
    least = least_nodes(capacities, wanted, partial=partial)
    if least > len(capacities.nodes):
        return Infeasible(reason=f"no plan can give {wanted:.1f} tokens/s: all nodes together do not do that much work")
    best = solve(profile, concurrency, seconds / 3)
    if isinstance(best, Infeasible):
        return best
    bound = best.predicted.upper_bound_tokens_per_s
    given = best.predicted.expected[-1].total_tokens_per_s
    if given < wanted:
        return Infeasible(reason=f"all nodes together are expected to give {given:.1f} of {wanted:.1f} tokens/s")
    order = _by_work(capacities)
    low, high = least, len(best.placement)  # the plan at hand shows that `high` nodes are enough
    rounds = max(1, high.bit_length())
    while low < high:
        count = (low + high) // 2
        answer = solve(without_nodes(profile, order[count:]), concurrency, seconds * 2 / 3 / rounds)
        if isinstance(answer, Plan) and answer.predicted.expected[-1].total_tokens_per_s >= wanted:
            best, high = answer, min(count, len(answer.placement))
        else:
            low = count + 1
    best = _bounded(best, bound)
    return msgspec.structs.replace(best, predicted=msgspec.structs.replace(best.predicted, least_nodes=least))


def _bounded(plan: Plan, bound: float) -> Plan:
    """The plan beside the bound of the question, not that of the fewer nodes or requests that it was found with."""
    flow = plan.predicted.max_flow_tokens_per_s
    bound = max(bound, flow)
    predicted = msgspec.structs.replace(plan.predicted, upper_bound_tokens_per_s=bound, gap=(bound - flow) / flow)
    return msgspec.structs.replace(plan, predicted=predicted)


def _by_work(capacities: Capacities) -> Sequence[str]:
    """Nodes by layers x tokens/s at half of what they hold, with room for KV cache to break ties; most first."""

    def work(name: str) -> tuple[float, float]:
        layers = max(1, capacities.max_layers(name) // 2)
        start = 1 if layers < capacities.model.num_layers else 0
        held = LayerRange(start, start + layers)
        if not capacities.can_hold(name, held):
            return 0.0, 0.0
        return layers * capacities.tokens_per_s(name, held), admitted_requests(capacities, name, held)

    return sorted(capacities.nodes, key=work, reverse=True)


def _keeps(expected: Expected, max_tpot_s: float | None, max_ttft_s: float | None) -> bool:
    is_tpot = max_tpot_s is None or (expected.tpot_s is not None and expected.tpot_s <= max_tpot_s)
    is_ttft = max_ttft_s is None or (expected.ttft_s is not None and expected.ttft_s <= max_ttft_s)
    return is_tpot and is_ttft


def _milliseconds(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else f"{seconds * 1000:.1f} ms"
