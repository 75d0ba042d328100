"""All methods side by side, each plan through the same checker."""

from __future__ import annotations

from collections.abc import Iterator

from profiler.cluster_profile import ClusterProfile

from .baselines import METHODS
from .plan import Infeasible, Plan
from .search import solve_placement


def comparison_lines(profile: ClusterProfile, plan: Plan) -> Iterator[str]:
    """A plan beside the plans of every baseline for the same question."""
    assumed = plan.assumptions
    yield f"{'method':<12} {'nodes':>5} {'max-flow':>12} {'expected':>12}  tokens/s"
    yield _line(plan.solver.method, plan)
    for method in METHODS:
        answer = solve_placement(
            profile,
            assumed.workload,
            concurrency=assumed.concurrency,
            objective=assumed.objective,
            method=method,
            partial=assumed.partial_inference,
        )
        yield _line(method, answer)


def _line(method: str, answer: Plan | Infeasible) -> str:
    if isinstance(answer, Infeasible):
        return f"{method:<12} no plan: {answer.reason}"
    return (
        f"{method:<12} {len(answer.placement):>5} {answer.predicted.max_flow_tokens_per_s:>12.1f} "
        f"{answer.predicted.expected[-1].total_tokens_per_s:>12.1f}"
    )
