"""All methods side by side, each plan through the same checker."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from helixbench.solver.placement.baselines import METHODS
from helixbench.solver.placement.published import PUBLISHED
from helixbench.solver.problem.plan import Infeasible, Plan
from helixbench.solver.questions.request import PlanRequest, answer


def comparison_lines(request: PlanRequest, plan: Plan) -> Iterator[str]:
    """A plan beside what every baseline and the published formulation, in the same time, make of the same question.

    The bound of a row is the least max-flow that has been proven by then to be out of reach of every plan: one method's
    proof holds for all.

    Raises:
        KeyboardInterrupt: after the row of the method that Ctrl-C ended.
    """
    yield f"{'method':<12} {'nodes':>5} {'max-flow':>12} {'bound':>12} {'gap':>8} {'expected':>12}  tokens/s"
    bound = plan.predicted.upper_bound_tokens_per_s
    yield _line(plan.solver.method, plan, bound)
    asked = dataclasses.replace(
        request,
        concurrency=plan.assumptions.concurrency,
        max_tpot_s=None,
        max_ttft_s=None,
        min_tokens_per_s=None,
    )
    for method in (*METHODS, PUBLISHED):
        if method != plan.solver.method:
            found = answer(dataclasses.replace(asked, method=method))
            if isinstance(found, Plan):
                bound = min(bound, found.predicted.upper_bound_tokens_per_s)
            yield _line(method, found, bound)
            if isinstance(found, Plan) and found.solver.status == "interrupted":
                raise KeyboardInterrupt


def _line(method: str, found: Plan | Infeasible, bound: float) -> str:
    """A row; ``bound`` is of any plan's max-flow, and the row's gap to it."""
    if isinstance(found, Infeasible):
        return f"{method:<12} no plan: {found.reason}"
    flow = found.predicted.max_flow_tokens_per_s
    return (
        f"{method:<12} {len(found.placement):>5} {flow:>12.1f} {bound:>12.1f} {max(0.0, bound / flow - 1):>8.2%} "
        f"{found.predicted.expected[-1].total_tokens_per_s:>12.1f}"
    )
