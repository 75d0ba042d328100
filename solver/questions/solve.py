"""One search: from a question to the best plan found, checked, or why there is none.

Whatever ends the search (proof, time limit, Ctrl-C), the best plan so far is returned with the bound proven so far.
"""

from __future__ import annotations

from helixbench.errors import InputError
from helixbench.solver.expected.simulated import Budget
from helixbench.solver.flow.highs import load_highspy
from helixbench.solver.flow.pulp_solvers import HIGHS, find_solver
from helixbench.solver.placement import milp
from helixbench.solver.placement.baselines import METHODS
from helixbench.solver.placement.incumbent import Search, simulation_budget
from helixbench.solver.placement.progress import OnProgress
from helixbench.solver.placement.search import run_search
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.checker import require_sound
from helixbench.solver.problem.feasibility import why_infeasible
from helixbench.solver.problem.plan import Infeasible, LayerRange, Placement, Plan, SearchStatus, SolverFacts
from helixbench.solver.questions.assemble import CUT_SHORT_NOTE, assemble, interrupted
from helixbench.solver.questions.config import SolveConfig


def solve_placement(config: SolveConfig, on_progress: OnProgress | None = None) -> Plan | Infeasible:
    """The best plan found by the objective, whatever the targets, checked; or why there is none.

    Raises:
        InputError: a node with a capacity table that has no memory for any layer; a solver that is not there.
    """
    load_highspy()
    capacities = config.capacities()
    _require_room_at_tables(capacities)
    reason = why_infeasible(capacities)
    if reason is not None:
        return Infeasible(reason=reason)
    solver = find_solver(config.solver)
    limits = milp.Limits(time_s=config.time_limit_s, threads=config.threads, seed=config.seed, solver=solver)
    search = Search(capacities, config.objective, limits, on_progress or (lambda _: None))
    try:
        search.offer(config.start, "the placement to start from")
        status = run_search(search, config.method)
    except KeyboardInterrupt:
        status = "interrupted"
    if search.best is None:
        return Infeasible(reason=_why_nothing(search, config.method, status))
    facts = SolverFacts(
        method=config.method,
        backend=_backend(solver),
        seconds=search.elapsed(),
        status=status,
        seed=config.seed,
        threads=config.threads,
    )
    plan = _written_up(search, search.best, facts)
    require_sound(config.cluster, plan)
    return plan


def _written_up(search: Search, best: Placement, facts: SolverFacts) -> Plan:
    """The plan of the best placement. Ctrl-C ends its simulation; a plan is returned all the same."""
    try:
        return assemble(
            search.capacities,
            best,
            objective=search.objective,
            bound=search.bound,
            facts=facts,
            budget=simulation_budget(search.limits.time_s, search.objective),
        )
    except KeyboardInterrupt:
        plan = assemble(
            search.capacities,
            best,
            objective=search.objective,
            bound=search.bound,
            facts=facts,
            budget=Budget(0),
            notes=(CUT_SHORT_NOTE,),
            is_analytic=True,
        )
        return interrupted(plan)


def _backend(solver: str) -> str:
    from importlib.metadata import version

    other = "" if solver == HIGHS else f"{solver}, flows by "
    return f"PuLP {version('pulp')}, {other}HiGHS {version('highspy')}"


def _require_room_at_tables(capacities: Capacities) -> None:
    """A capacity table is trusted on the number of layers, but beside one of them some KV cache has to fit.

    Raises:
        InputError: a node with a table whose memory holds no layer.
    """
    last = capacities.model.num_layers - 1
    for name, node in capacities.nodes.items():
        if node.cost is not None or not node.max_layers:
            continue
        if not any(capacities.kv_tokens(name, LayerRange(at, at + 1)) for at in {0, min(1, last), last}):
            raise InputError(
                f"node {name}: device.memory_bytes {node.device.memory_bytes:.4g}, which does not hold the KV cache of "
                f"a token beside one layer of {capacities.model.layer_weight_bytes:.4g} bytes, though its capacity "
                f"table says {node.max_layers} layers; give its memory in bytes, or leave it out (--exclude {name})"
            )


def _why_nothing(search: Search, method: str, status: SearchStatus) -> str:
    num_layers = search.capacities.model.num_layers
    after = " that goes on after the loss of any one node" if search.capacities.survive else ""
    if method in METHODS:
        return (
            f"the {method} rule finds no placement of all {num_layers} layers{after} on this cluster; try --method auto"
        )
    if status in ("time limit", "interrupted"):
        return f"no placement{after} was found before the search ended ({status}); none is proven not to exist"
    if after:
        return f"no placement of all {num_layers} layers goes on after the loss of any one node"
    return (
        f"no placement of all {num_layers} layers carries any flow: the ranges that fit the nodes do not join up "
        "over the links that there are"
    )
