"""The best plan for a model on a cluster: from the question to a checked plan, or to why there is none.

Whatever ends the search - proof, time limit or Ctrl-C - the best plan so far is returned, with the bound proven so far.
"""

from __future__ import annotations

from collections.abc import Mapping

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.solver.placement import milp
from helixbench.solver.placement.baselines import METHODS
from helixbench.solver.placement.feasibility import why_infeasible
from helixbench.solver.placement.incumbent import Search
from helixbench.solver.placement.progress import OnProgress
from helixbench.solver.placement.published import PUBLISHED
from helixbench.solver.placement.steps import run_search, solve_published
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.checker import require_sound
from helixbench.solver.problem.plan import Infeasible, LayerRange, Plan, SolverFacts
from helixbench.solver.problem.question import Objective, Question
from helixbench.solver.problem.workload import Workload
from helixbench.solver.questions.assemble import CUT_SHORT_NOTE, assemble, interrupted
from helixbench.solver.questions.verdict import with_verdicts

MAX_SEED = 2**31 - 1
"""What HiGHS takes."""


def solve_placement(
    profile: ClusterProfile,
    workload: Workload,
    *,
    concurrency: int | None = None,
    objective: Objective = "throughput",
    method: str = "auto",
    time_limit_s: float = 60.0,
    threads: int = 1,
    seed: int = 0,
    partial: bool = True,
    pins: Mapping[str, LayerRange] | None = None,
    start: Mapping[str, LayerRange] | None = None,
    is_brief: bool = False,
    on_progress: OnProgress | None = None,
) -> Plan | Infeasible:
    """The best plan found for a model on a cluster, checked, or why there is none.

    Args:
        profile: the cluster and the model.
        workload: lengths of requests.
        concurrency: requests in flight; ``None`` for as many as the KV caches hold.
        objective: ``throughput`` for the most expected tokens/s, ``max-flow`` for the largest flow.
        method: ``auto`` for the search, the name of a baseline, or ``published`` for the published formulation.
        time_limit_s: the search ends by then with the best so far.
        threads: for HiGHS.
        seed: of everything random.
        partial: whether a request may enter a node's range late.
        pins: node -> the range that it has to hold where it is used.
        start: a placement that the search begins with, such as the one that is served now.
        is_brief: only the flow is of interest: what is expected is taken by means alone.
        on_progress: called as the search goes.

    Raises:
        InputError: no such method or node, an option out of range, or a node with a capacity table that has no memory
            for any layer.
    """
    _require_options(method, time_limit_s, threads, concurrency, seed)
    require_pins(profile, pins or {})
    capacities = Capacities(profile, workload, concurrency=concurrency, pins=pins)
    _require_room_at_tables(capacities)
    reason = why_infeasible(capacities)
    if reason is not None:
        return Infeasible(reason=reason)
    question = Question(capacities, objective, partial)
    limits = milp.Limits(time_s=time_limit_s, threads=threads, seed=seed)
    search = Search(question, limits, on_progress or (lambda _: None))
    try:
        status = _searched(search, method, start)
    except KeyboardInterrupt:
        status = "interrupted"
    if search.best is None:
        return Infeasible(reason=_why_nothing(search, method, status))
    facts = SolverFacts(
        method=method, backend=_backend(), seconds=search.elapsed(), status=status, seed=seed, threads=threads
    )
    plan = _written_up(search, search.best, facts, is_brief=is_brief)
    require_sound(profile, plan)
    return plan


def _searched(search: Search, method: str, start: Mapping[str, LayerRange] | None) -> str:
    """Search by the method; the status."""
    if method in METHODS:
        search.offer(METHODS[method](search.question.capacities), f"{method} placement")
        return "done" if search.best is not None else ""
    if method == PUBLISHED:
        return solve_published(search)
    search.offer(start, "the placement to start from")
    return run_search(search)


def _written_up(search: Search, best: Mapping[str, LayerRange], facts: SolverFacts, *, is_brief: bool) -> Plan:
    """The plan of the best placement. Ctrl-C ends what takes long about it; a plan is returned all the same."""
    try:
        plan = assemble(search.question, best, bound=search.bound, facts=facts, is_brief=is_brief)
    except KeyboardInterrupt:
        notes = () if is_brief else (CUT_SHORT_NOTE,)
        plan = assemble(search.question, best, bound=search.bound, facts=facts, notes=notes, is_brief=True)
        return interrupted(plan)
    try:
        return plan if is_brief else with_verdicts(search.question, plan)
    except KeyboardInterrupt:
        return interrupted(plan)


def _backend() -> str:
    from importlib.metadata import version

    return f"PuLP {version('pulp')}, HiGHS {version('highspy')}"


def _require_options(method: str, time_limit_s: float, threads: int, concurrency: int | None, seed: int) -> None:
    known = ("auto", *METHODS, PUBLISHED)
    if method not in known:
        raise InputError(f"--method {method}: no such method; choose from {', '.join(known)}")
    if not 0 < time_limit_s < float("inf"):
        raise InputError(f"--time-limit-s {time_limit_s}: need a finite limit of more than 0 seconds")
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"--seed {seed}: need 0 to {MAX_SEED}")
    if threads < 1:
        raise InputError(f"--threads {threads}: need at least 1")
    if concurrency is not None and concurrency < 1:
        raise InputError(f"--concurrency {concurrency}: need at least 1 request in flight")


def _require_room_at_tables(capacities: Capacities) -> None:
    """A capacity table is taken at its word on layers, but beside one of them some KV cache has to fit.

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


def require_pins(profile: ClusterProfile, pins: Mapping[str, LayerRange]) -> None:
    """Refuse a pin that no plan can keep.

    Raises:
        InputError: no such node, more layers than it holds, or layers that the model does not have.
    """
    nodes = {node.name: node for node in profile.nodes}
    for name, held in pins.items():
        if name not in nodes:
            raise InputError(f"--pin {name}={held}: no node {name!r}; there are {', '.join(nodes)}")
        if held.num_layers > nodes[name].max_layers:
            raise InputError(f"--pin {name}={held}: {name} holds at most {nodes[name].max_layers} layers")
        if held.end > profile.model.num_layers:
            raise InputError(f"--pin {name}={held}: the model has {profile.model.num_layers} layers")


def _why_nothing(search: Search, method: str, status: str) -> str:
    num_layers = search.question.capacities.model.num_layers
    if method in METHODS:
        return f"the {method} rule finds no placement of all {num_layers} layers on this cluster; try --method auto"
    if status in ("time limit", "interrupted"):
        return f"no placement was found before the search ended ({status}); none is proven not to exist"
    return (
        f"no placement of all {num_layers} layers carries any flow: the ranges that fit the nodes do not join up "
        "over the links that there are"
    )
