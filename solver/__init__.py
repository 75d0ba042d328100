"""What is the best plan, and how good is it provably? Turns a ``ClusterProfile`` into a ``Plan``.

The names are imported when they are first used: whoever needs the serving rules alone does not load the search.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from helixbench.solver.flow.pipelines import pipelines
    from helixbench.solver.placement.progress import Progress
    from helixbench.solver.problem.checker import PlanError, problems_of, require_sound
    from helixbench.solver.problem.plan import Hop, Infeasible, LayerRange, LinkFlow, Pipeline, Plan
    from helixbench.solver.problem.workload import Workload, fixed_workload, trace_workload
    from helixbench.solver.questions.answer import Answer, answer
    from helixbench.solver.questions.config import SolveConfig
    from helixbench.solver.questions.solve import solve_placement

__all__ = [
    "Answer",
    "Hop",
    "Infeasible",
    "LayerRange",
    "LinkFlow",
    "Pipeline",
    "Plan",
    "PlanError",
    "Progress",
    "SolveConfig",
    "Workload",
    "answer",
    "fixed_workload",
    "pipelines",
    "problems_of",
    "require_sound",
    "solve_placement",
    "trace_workload",
]

_HOMES = {
    "Answer": "questions.answer",
    "Hop": "problem.plan",
    "Infeasible": "problem.plan",
    "LayerRange": "problem.plan",
    "LinkFlow": "problem.plan",
    "Pipeline": "problem.plan",
    "Plan": "problem.plan",
    "PlanError": "problem.checker",
    "Progress": "placement.progress",
    "SolveConfig": "questions.config",
    "Workload": "problem.workload",
    "answer": "questions.answer",
    "fixed_workload": "problem.workload",
    "pipelines": "flow.pipelines",
    "problems_of": "problem.checker",
    "require_sound": "problem.checker",
    "solve_placement": "questions.solve",
    "trace_workload": "problem.workload",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
