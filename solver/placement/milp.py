"""The placement problem as a mixed-integer program over arcs ``start -> end``, in PuLP, solved by HiGHS.

Two models. ``pooled`` merges nodes of one kind into integer counts and lets flow meet at layer boundaries: exact when
no link or NIC can bind, a relaxation otherwise. ``linked`` decides node by node, with a flow on every link.
Both clip every capacity at a bound ``U`` on the flow; without it HiGHS finds nothing for long (docs/design/bounds.md).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Placement


@dataclass(frozen=True)
class Limits:
    """What a solve may spend, and when it is good enough. Same limits, seed and model: same answer."""

    time_s: float = 60.0
    threads: int = 1
    seed: int = 0
    relative_gap: float = 1e-6


class End(enum.Enum):
    """Why HiGHS ended."""

    OPTIMAL = enum.auto()
    INFEASIBLE = enum.auto()
    TIME_LIMIT = enum.auto()
    INTERRUPTED = enum.auto()
    OTHER = enum.auto()


@dataclass(frozen=True)
class Outcome:
    """What HiGHS itself reports. ``bound`` is its proven upper bound, tokens/s; ``placement`` its best, if any."""

    placement: Placement | None
    value: float
    bound: float
    end: End
    seconds: float


Report = Callable[[float, float, float], None]
"""(incumbent, bound, seconds) as the solver goes."""


@dataclass
class Model:
    """A PuLP problem under construction, and what its integer variables mean.

    ``choices`` maps a variable's name to (nodes it may stand for, range); a model of another form has ``decode``, from
    the variables' values to a placement.
    """

    problem: Any
    choices: dict[str, tuple[tuple[str, ...], LayerRange]] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    decode: Callable[[Sequence[float]], Placement] | None = None


def ranges_of(capacities: Capacities, name: str) -> list[LayerRange]:
    """Every range that a node can hold."""
    num_layers = capacities.model.num_layers
    longest = min(capacities.nodes[name].max_layers, num_layers)
    found = (LayerRange(s, s + k) for k in range(1, longest + 1) for s in range(num_layers - k + 1))
    return [held for held in found if capacities.can_hold(name, held)]


def pooled_model(capacities: Capacities, names: Sequence[str], *, partial: bool, clip: float) -> Model:
    """Nodes of one kind as integer counts; flow meets at layer boundaries, whatever node it comes from.

    A token that a capacity table counts alike wherever it enters may as well step back to the range's start: partial
    inference is then one arc ``v -> v - 1`` per boundary, on the way into such nodes.

    Args:
        capacities: of the nodes.
        names: the nodes that may be used.
        partial: whether a request may enter a range late.
        clip: a bound on the flow.
    """
    import pulp

    num_layers = capacities.model.num_layers
    model = Model(pulp.LpProblem("pooled", pulp.LpMaximize))
    total = model.problem.add_variable("F", 0, clip)
    into: list[list[Any]] = [[] for _ in range(num_layers + 1)]  # boundary -> flow arriving there
    out_of: list[list[Any]] = [[] for _ in range(num_layers + 1)]  # boundary -> flow leaving from there
    from_pool: list[list[Any]] = [[] for _ in range(num_layers + 1)]  # the same, of nodes that may be entered late
    for number, members in enumerate(_kinds(capacities, names)):
        example = members[0]
        counts = []
        for held in ranges_of(capacities, example):
            label = f"{number}_{held.start}_{held.end}"
            count = model.problem.add_variable(f"y_{label}", 0, len(members), pulp.LpInteger)
            model.choices[count.name] = (members, held)
            model.variables[count.name] = count
            counts.append(count)
            flows = _range_flows(model, capacities, example, held, count, clip=clip, partial=partial, label=label)
            for entry, flow in flows.items():
                late = partial and not capacities.is_time_shared(example)
                (from_pool if late else out_of)[entry].append(flow)
                into[held.end].append(flow)
        if counts:
            model.problem += pulp.lpSum(counts) <= len(members), f"count_{number}"
    model.problem.setObjective(total)
    _boundaries(model.problem, total, into, out_of, from_pool)
    return model


def _range_flows(
    model: Model,
    capacities: Capacities,
    name: str,
    held: LayerRange,
    count: Any,
    *,
    clip: float,
    partial: bool,
    label: str,
) -> dict[int, Any]:
    """Flow variables by entry layer of ``count`` nodes that hold a range, with their shared capacity."""
    import pulp

    is_shared = partial and capacities.is_time_shared(name)
    entries = range(held.start, held.end) if is_shared else (held.start,)
    flows = {entry: model.problem.add_variable(f"f_{label}_{entry}", 0) for entry in entries}
    rates = {entry: capacities.tokens_per_s(name, held, entry) for entry in entries}
    if len(flows) == 1:
        model.problem += flows[held.start] <= min(rates[held.start], clip) * count
        return flows
    model.problem += pulp.lpSum(flow / rates[entry] for entry, flow in flows.items()) <= count
    model.problem += pulp.lpSum(flows.values()) <= clip * count
    for entry, flow in flows.items():
        if rates[entry] < clip:
            model.problem += flow <= rates[entry] * count
    return flows


def _boundaries(
    problem: Any, total: Any, into: list[list[Any]], out_of: list[list[Any]], from_pool: list[list[Any]]
) -> None:
    """Conservation at every boundary: the source is 0, the sink is the last."""
    import pulp

    last = len(into) - 1
    has_pool = any(from_pool)
    enter = [problem.add_variable(f"enter_{v}", 0) if has_pool and v < last else 0 for v in range(last + 1)]
    back = [problem.add_variable(f"back_{v}", 0) if has_pool and 0 < v < last else 0 for v in range(last + 2)]
    for v in range(last + 1):
        arriving = pulp.lpSum(into[v]) + (total if v == 0 else 0)
        leaving = pulp.lpSum(out_of[v]) + enter[v] + (total if v == last else 0)
        problem += arriving == leaving, f"boundary_{v}"
        if has_pool and v < last:
            problem += enter[v] + back[v + 1] == back[v] + pulp.lpSum(from_pool[v]), f"pool_{v}"


def linked_model(capacities: Capacities, names: Sequence[str], *, partial: bool, clip: float) -> Model:
    """Node by node with a flow on every link at every boundary: exact where links and NICs bind."""
    import pulp

    num_layers = capacities.model.num_layers
    model = Model(pulp.LpProblem("linked", pulp.LpMaximize))
    total = model.problem.add_variable("F", 0, clip)
    arriving: dict[tuple[str, int], list[Any]] = {}  # (node, layer) -> flows on links that enter it there
    leaving: dict[tuple[str, int], list[Any]] = {}  # (node, layer) -> flows on links that leave it there
    entered: dict[tuple[str, int], list[Any]] = {}  # (node, layer) -> flows through it from there
    ended: dict[tuple[str, int], list[Any]] = {}  # (node, layer) -> flows through it to there
    may_enter: dict[tuple[str, int], list[Any]] = {}  # (node, layer) -> choices under which it can be entered there
    may_leave: dict[tuple[str, int], list[Any]] = {}  # (node, layer) -> choices under which it ends there
    for number, name in enumerate(names):
        chosen = []
        for held in ranges_of(capacities, name):
            label = f"{number}_{held.start}_{held.end}"
            choice = model.problem.add_variable(f"y_{label}", 0, 1, pulp.LpInteger)
            model.choices[choice.name] = ((name,), held)
            model.variables[choice.name] = choice
            chosen.append(choice)
            for entry, flow in _late_flows(model, capacities, name, held, choice, clip, partial, label).items():
                entered.setdefault((name, entry), []).append(flow)
                ended.setdefault((name, held.end), []).append(flow)
                may_enter.setdefault((name, entry), []).append(choice)
            may_leave.setdefault((name, held.end), []).append(choice)
        if chosen:
            model.problem += pulp.lpSum(chosen) <= 1, f"one_{number}"
    sent: dict[str, list[Any]] = {}  # node -> bytes/s on each of its links out
    received: dict[str, list[Any]] = {}  # node -> bytes/s on each of its links in
    number_of = {COORDINATOR: len(names), **{name: number for number, name in enumerate(names)}}
    for src in (COORDINATOR, *names):
        for dst in (*names, COORDINATOR):
            bandwidth = None if src == dst else capacities.links.bandwidth(src, dst)
            if bandwidth is None:
                continue
            size = capacities.profile.bytes_per_token(src, dst)
            limit = min(bandwidth / size, clip)
            on_link = []
            for layer in range(num_layers + 1):
                at_src, at_dst = (src, layer), (dst, layer)
                leaves = layer == 0 if src == COORDINATOR else at_src in may_leave
                enters = layer == num_layers if dst == COORDINATOR else at_dst in may_enter
                if not (leaves and enters):
                    continue
                flow = model.problem.add_variable(f"g_{number_of[src]}_{number_of[dst]}_{layer}", 0, limit)
                on_link.append(flow)
                leaving.setdefault(at_src, []).append(flow)
                arriving.setdefault(at_dst, []).append(flow)
                for end, choices in ((src, may_leave.get(at_src)), (dst, may_enter.get(at_dst))):
                    if end != COORDINATOR and choices is not None:
                        model.problem += flow <= limit * pulp.lpSum(choices)
            if len(on_link) > 1 and limit < clip:
                model.problem += pulp.lpSum(on_link) <= limit
            if on_link:
                sent.setdefault(src, []).append(size * pulp.lpSum(on_link))
                received.setdefault(dst, []).append(size * pulp.lpSum(on_link))
    for at in sorted(set(arriving) | set(entered)):
        if at[0] != COORDINATOR:
            model.problem += pulp.lpSum(arriving.get(at, [])) == pulp.lpSum(entered.get(at, []))
    for at in sorted(set(leaving) | set(ended)):
        if at[0] != COORDINATOR:
            model.problem += pulp.lpSum(leaving.get(at, [])) == pulp.lpSum(ended.get(at, []))
    model.problem += pulp.lpSum(leaving.get((COORDINATOR, 0), [])) == total
    model.problem += pulp.lpSum(arriving.get((COORDINATOR, num_layers), [])) == total
    _limit_nics(model.problem, capacities, sent, received)
    model.problem.setObjective(total)
    return model


def _late_flows(
    model: Model,
    capacities: Capacities,
    name: str,
    held: LayerRange,
    choice: Any,
    clip: float,
    partial: bool,
    label: str,
) -> dict[int, Any]:
    """Flow variables of one node and range by entry layer, late entries of capacity tables included."""
    import pulp

    if not partial or capacities.is_time_shared(name):
        return _range_flows(model, capacities, name, held, choice, clip=clip, partial=partial, label=label)
    flows = {entry: model.problem.add_variable(f"f_{label}_{entry}", 0) for entry in range(held.start, held.end)}
    model.problem += pulp.lpSum(flows.values()) <= min(capacities.tokens_per_s(name, held), clip) * choice
    return flows


def _limit_nics(
    problem: Any, capacities: Capacities, sent: Mapping[str, list[Any]], received: Mapping[str, list[Any]]
) -> None:
    import pulp

    for way, flows in enumerate((sent, received)):
        for name, sizes in flows.items():
            limit = capacities.links.nics(name)[way]
            if limit is not None:
                problem += pulp.lpSum(sizes) / limit <= 1


def solve(
    model: Model, limits: Limits, *, hint: Mapping[str, LayerRange] | None = None, report: Report | None = None
) -> Outcome:
    """Solve a model; a time limit or Ctrl-C ends it with the best found so far.

    Status, incumbent and bound are HiGHS's own: PuLP calls a run that its time limit stopped "Optimal".
    """
    import highspy
    import pulp

    backend = pulp.HiGHS(msg=False, threads=limits.threads, timeLimit=limits.time_s, gapRel=limits.relative_gap)
    backend.createAndConfigureSolver(model.problem)
    highs = model.problem.solverModel
    highs.setOptionValue("random_seed", limits.seed)
    highs.setOptionValue("mip_abs_gap", 1e-9)
    backend.buildSolverModel(model.problem)
    if hint:
        _set_hint(highs, model, hint)
    if report is not None:
        _follow(highs, report)
    highs.HandleKeyboardInterrupt = True
    highs.solve()
    info = highs.getInfo()
    ends = {
        highspy.HighsModelStatus.kOptimal: End.OPTIMAL,
        highspy.HighsModelStatus.kInfeasible: End.INFEASIBLE,
        highspy.HighsModelStatus.kTimeLimit: End.TIME_LIMIT,
        highspy.HighsModelStatus.kInterrupt: End.INTERRUPTED,
    }
    end = ends.get(highs.getModelStatus(), End.OTHER)
    has_solution = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    values = highs.getSolution().col_value if has_solution else []
    bound = -info.mip_dual_bound if model.choices or model.decode else 0.0
    if end is End.OPTIMAL and has_solution:
        # The gap that remains is the tolerance; the bound never stands below the value that proves it.
        bound = max(bound, -info.objective_function_value)
    if end is End.INFEASIBLE:
        bound = 0.0
    return Outcome(
        placement=_placement(model, values) if has_solution else None,
        value=-info.objective_function_value if has_solution else 0.0,
        bound=bound,
        end=end,
        seconds=highs.getRunTime(),
    )


def _set_hint(highs: Any, model: Model, hint: Mapping[str, LayerRange]) -> None:
    """Give HiGHS a placement to start from: the integers; it finds the flows itself."""
    import numpy as np

    left = dict(hint)
    index, value = [], []
    for name, (members, held) in model.choices.items():
        holders = [member for member in members if left.get(member) == held]
        index.append(model.variables[name].index)
        value.append(float(len(holders)))
    highs.setSolution(len(index), np.array(index, dtype=np.int32), np.array(value, dtype=np.float64))


def _follow(highs: Any, report: Report) -> None:
    def heard(event: Any) -> None:
        report(-event.data_out.mip_primal_bound, -event.data_out.mip_dual_bound, event.data_out.running_time)

    highs.cbMipLogging.subscribe(heard)
    highs.cbMipImprovingSolution.subscribe(heard)


def _placement(model: Model, values: Sequence[float]) -> Placement:
    """Ranges to nodes: of alike nodes the first in order take the first ranges."""
    if model.decode is not None:
        return model.decode(values)
    taken: set[str] = set()
    placement: Placement = {}
    for name, (members, held) in sorted(model.choices.items(), key=lambda item: (item[1][0], item[1][1])):
        for _ in range(round(values[model.variables[name].index])):
            member = next(m for m in members if m not in taken)
            taken.add(member)
            placement[member] = held
    return placement


def _kinds(capacities: Capacities, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Nodes of one kind together, each group and the groups in the given order."""
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(capacities.kind(name), []).append(name)
    return [tuple(members) for members in groups.values()]
