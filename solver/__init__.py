"""What is the best plan, and how good is it provably? Turns a ``ClusterProfile`` into a ``Plan``."""

from .checker import PlanError, problems_of, require_sound
from .plan import Infeasible, LayerRange, LinkFlow, Plan
from .progress import Progress
from .routes import Hop, Pipeline, pipelines
from .search import solve_placement
from .workload import Workload, fixed_workload, trace_workload

__all__ = [
    "Hop",
    "Infeasible",
    "LayerRange",
    "LinkFlow",
    "Pipeline",
    "Plan",
    "PlanError",
    "Progress",
    "Workload",
    "fixed_workload",
    "pipelines",
    "problems_of",
    "require_sound",
    "solve_placement",
    "trace_workload",
]
