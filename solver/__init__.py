"""What is the best plan, and how good is it provably? Turns a ``ClusterProfile`` into a ``Plan``."""

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
