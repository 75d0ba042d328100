"""All methods side by side, each plan through the same checker."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .baselines import METHODS
from .plan import Infeasible, Plan
from .published import PUBLISHED
from .request import PlanRequest, answer


def comparison_lines(request: PlanRequest, plan: Plan) -> Iterator[str]:
    """A plan beside what every baseline and the published formulation, in the same time, make of the same question."""
    yield f"{'method':<12} {'nodes':>5} {'max-flow':>12} {'expected':>12}  tokens/s"
    yield _line(plan.solver.method, plan)
    asked = dataclasses.replace(
        request,
        concurrency=plan.assumptions.concurrency,
        max_tpot_s=None,
        max_ttft_s=None,
        min_tokens_per_s=None,
    )
    for method in (*METHODS, PUBLISHED):
        if method != plan.solver.method:
            yield _line(method, answer(dataclasses.replace(asked, method=method)))


def _line(method: str, found: Plan | Infeasible) -> str:
    if isinstance(found, Infeasible):
        return f"{method:<12} no plan: {found.reason}"
    return (
        f"{method:<12} {len(found.placement):>5} {found.predicted.max_flow_tokens_per_s:>12.1f} "
        f"{found.predicted.expected[-1].total_tokens_per_s:>12.1f}"
    )
