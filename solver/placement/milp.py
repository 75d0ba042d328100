"""The placement problem as a mixed-integer program over arcs ``start -> end``, solved by HiGHS or others.

A node that holds ``[start, end)`` is an arc between two layer boundaries, with one integer ``y``, the number of
alike nodes that hold it, and flow of at most ``T * y`` on it. Two models. ``pooled`` merges nodes of one kind into
counts and lets flow meet at layer boundaries: exact when no link or NIC can bind, a relaxation otherwise. ``linked``
decides node by node, with a flow on every link.

Both clip every capacity at a bound ``U`` on the flow: then ``T`` is as small a big-M as there is, and the relaxation is
near the optimum. Without it HiGHS finds nothing for long (docs/design/bounds.md).
"""

from __future__ import annotations

import enum
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.flow.highs import load_highspy
from helixbench.solver.flow.pulp_solvers import HIGHS, solve_with
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Placement


@dataclass(frozen=True)
class Limits:
    """Limits of a solve, the gap at which it ends, PuLP's name of the solver. Same limits and model: same answer."""

    time_s: float = 60.0
    threads: int = 1
    seed: int = 0
    relative_gap: float = 1e-6
    solver: str = HIGHS


class End(enum.Enum):
    """Why HiGHS ended."""

    OPTIMAL = enum.auto()
    INFEASIBLE = enum.auto()
    TIME_LIMIT = enum.auto()
    INTERRUPTED = enum.auto()
    OTHER = enum.auto()


@dataclass(frozen=True)
class Outcome:
    """HiGHS's own report. ``bound`` is its proven upper bound, tokens/s; ``placement`` its best, if any."""

    placement: Placement | None
    value: float
    bound: float
    end: End
    seconds: float


Report = Callable[[float, float, float], None]
"""(incumbent, bound, seconds) as the solver goes."""


_At = defaultdict[tuple[str, int], list[Any]]
"""(node, layer) -> variables."""


@dataclass(frozen=True)
class Choice:
    """An integer variable: how many of these alike nodes hold a range."""

    variable: Any
    members: tuple[str, ...]
    held: LayerRange


@dataclass
class Model:
    """A PuLP problem under construction, and what its integer variables mean.

    That is ``choices``; a model of another form has ``decode``, from the variables' values to a placement.
    """

    problem: Any
    choices: list[Choice] = field(default_factory=list)
    decode: Callable[[Sequence[float]], Placement] | None = None

    def placement(self, values: Sequence[float]) -> Placement:
        """Ranges to nodes: of alike nodes the first in order take the first ranges."""
        if self.decode is not None:
            return self.decode(values)
        placement: Placement = {}
        for choice in sorted(self.choices, key=lambda choice: (choice.members, choice.held)):
            for _ in range(round(values[choice.variable.index])):
                placement[next(name for name in choice.members if name not in placement)] = choice.held
        return placement


def ranges_of(capacities: Capacities, name: str) -> list[LayerRange]:
    """Every range that a node can hold."""
    num_layers = capacities.model.num_layers
    longest = min(capacities.nodes[name].max_layers, num_layers)
    found = (LayerRange(s, s + k) for k in range(1, longest + 1) for s in range(num_layers - k + 1))
    return [held for held in found if capacities.can_hold(name, held)]


def pooled_model(capacities: Capacities, names: Sequence[str], *, clip: float) -> Model:
    """Nodes of one kind as integer counts; flow meets at layer boundaries, whatever node it comes from.

    A token that a capacity table counts alike wherever it enters may as well step back to the range's start: partial
    inference is then one arc ``v -> v - 1`` per boundary, on the way into such nodes, instead of a flow for each entry.

    Args:
        capacities: of the nodes.
        names: the nodes that may be used.
        clip: a bound on the flow.
    """
    import pulp

    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(capacities.kind(name), []).append(name)
    model = Model(pulp.LpProblem("pooled", pulp.LpMaximize))
    total = model.problem.add_variable("F", 0, clip)
    into: defaultdict[int, list[Any]] = defaultdict(list)  # boundary -> flow arriving there
    out_of: defaultdict[int, list[Any]] = defaultdict(list)  # boundary -> flow leaving from there
    from_pool: defaultdict[int, list[Any]] = defaultdict(list)  # the same, into nodes that tokens step back to
    for choice, flows in _choices(model, capacities, groups.values(), clip=clip, steps_back=True):
        has_table = not capacities.is_measured(choice.members[0])
        for entry, flow in flows.items():
            (from_pool if capacities.partial and has_table else out_of)[entry].append(flow)
            into[choice.held.end].append(flow)
    model.problem.setObjective(total)
    # Conservation at every boundary: the source is 0, the sink is the last. Beside each boundary is one of the pool,
    # where tokens enter from the boundary and from which they go on into a node or back by a layer.
    _require_cover(model, capacities)
    _require_one_of_each_group(model, capacities)
    last = capacities.model.num_layers
    has_pool = bool(from_pool)
    enter = [model.problem.add_variable(f"enter_{v}", 0) if has_pool and v < last else 0 for v in range(last + 1)]
    back = [model.problem.add_variable(f"back_{v}", 0) if has_pool and 0 < v < last else 0 for v in range(last + 2)]
    for v in range(last + 1):
        arriving = pulp.lpSum(into[v]) + (total if v == 0 else 0)
        leaving = pulp.lpSum(out_of[v]) + enter[v] + (total if v == last else 0)
        model.problem += arriving == leaving, f"boundary_{v}"
        if has_pool and v < last:
            model.problem += enter[v] + back[v + 1] == back[v] + pulp.lpSum(from_pool[v]), f"pool_{v}"
    return model


def linked_model(capacities: Capacities, names: Sequence[str], *, clip: float) -> Model:
    """Node by node with a flow on every link at every boundary: exact where links and NICs bind."""
    import pulp

    num_layers = capacities.model.num_layers
    model = Model(pulp.LpProblem("linked", pulp.LpMaximize))
    total = model.problem.add_variable("F", 0, clip)
    through_from: _At = defaultdict(list)  # flows through the node that begin there
    through_to: _At = defaultdict(list)  # flows through the node that end there
    may_enter: _At = defaultdict(list)  # choices under which it can be entered there
    may_leave: _At = defaultdict(list)  # choices under which it ends there
    for choice, flows in _choices(model, capacities, [[name] for name in names], clip=clip, steps_back=False):
        (name,), end = choice.members, choice.held.end
        for entry, flow in flows.items():
            through_from[name, entry].append(flow)
            through_to[name, end].append(flow)
            may_enter[name, entry].append(choice.variable)
        may_leave[name, end].append(choice.variable)
    arriving: _At = defaultdict(list)  # flows on links that enter the node there
    leaving: _At = defaultdict(list)  # flows on links that leave the node there
    sent: dict[str, list[Any]] = {}  # node -> bytes/s on each of its links out
    received: dict[str, list[Any]] = {}  # node -> bytes/s on each of its links in
    for (a, src), (b, dst) in itertools.permutations(enumerate((COORDINATOR, *names)), 2):
        bandwidth = capacities.links.bandwidth(src, dst)
        if bandwidth is None:
            continue
        size = capacities.profile.bytes_per_token(src, dst)
        limit = min(bandwidth / size, clip)
        on_link = []
        for layer in range(num_layers + 1):
            leaves = layer == 0 if src == COORDINATOR else (src, layer) in may_leave
            enters = layer == num_layers if dst == COORDINATOR else (dst, layer) in may_enter
            if not (leaves and enters):
                continue
            flow = model.problem.add_variable(f"g_{a}_{b}_{layer}", 0, limit)
            on_link.append(flow)
            leaving[src, layer].append(flow)
            arriving[dst, layer].append(flow)
            if src != COORDINATOR:
                model.problem += flow <= limit * pulp.lpSum(may_leave[src, layer])
            if dst != COORDINATOR:
                model.problem += flow <= limit * pulp.lpSum(may_enter[dst, layer])
        if len(on_link) > 1 and limit < clip:
            model.problem += pulp.lpSum(on_link) <= limit
        if on_link:
            sent.setdefault(src, []).append(size * pulp.lpSum(on_link))
            received.setdefault(dst, []).append(size * pulp.lpSum(on_link))
    for links, through in ((arriving, through_from), (leaving, through_to)):
        for at in sorted(links.keys() | through.keys()):
            if at[0] != COORDINATOR:
                model.problem += pulp.lpSum(links.get(at, [])) == pulp.lpSum(through.get(at, []))
    _require_cover(model, capacities)
    _require_one_of_each_group(model, capacities)
    model.problem += pulp.lpSum(leaving[COORDINATOR, 0]) == total
    model.problem += pulp.lpSum(arriving[COORDINATOR, num_layers]) == total
    for way, by_node in enumerate((sent, received)):
        for name, sizes in by_node.items():
            nic = capacities.links.nics(name)[way]
            if nic is not None:
                model.problem += pulp.lpSum(sizes) / nic <= 1
    model.problem.setObjective(total)
    return model


def _choices(
    model: Model, capacities: Capacities, groups: Iterable[Sequence[str]], *, clip: float, steps_back: bool
) -> Iterator[tuple[Choice, dict[int, Any]]]:
    """A choice for each range of each group of alike nodes, with the flows through it by entry layer.

    With ``steps_back`` tokens reach a node with a capacity table at its range's start, wherever they enter.
    """
    import pulp

    for number, members in enumerate(groups):
        example, chosen = members[0], []
        for held in ranges_of(capacities, example):
            label = f"{number}_{held.start}_{held.end}"
            variable = model.problem.add_variable(f"y_{label}", 0, len(members), pulp.LpInteger)
            chosen.append(variable)
            at_start = steps_back and not capacities.is_measured(example)
            entries = (held.start,) if at_start else capacities.entries(held)
            flows = {entry: model.problem.add_variable(f"f_{label}_{entry}", 0) for entry in entries}
            rates = {entry: capacities.tokens_per_s(example, held, entry) for entry in entries}
            if len(set(rates.values())) == 1:
                model.problem += pulp.lpSum(flows.values()) <= min(rates[held.start], clip) * variable
            else:
                # Entries share the nodes' time; clips of the sum and of each flow only make the relaxation tighter.
                model.problem += pulp.lpSum(flow / rates[entry] for entry, flow in flows.items()) <= variable
                model.problem += pulp.lpSum(flows.values()) <= clip * variable
                for entry, flow in flows.items():
                    if rates[entry] < clip:
                        model.problem += flow <= rates[entry] * variable
            model.choices.append(Choice(variable, tuple(members), held))
            yield model.choices[-1], flows
        if chosen:
            model.problem += pulp.lpSum(chosen) <= len(members), f"count_{number}"


def _require_cover(model: Model, capacities: Capacities) -> None:
    """Every layer is held by one node more than the placement has to survive the loss of."""
    import pulp

    if not capacities.survive:
        return
    for layer in range(capacities.model.num_layers):
        holding = [choice.variable for choice in model.choices if choice.held.start <= layer < choice.held.end]
        model.problem += pulp.lpSum(holding) >= 1 + capacities.survive, f"cover_{layer}"


def _require_one_of_each_group(model: Model, capacities: Capacities) -> None:
    """At most one node of each exclusive group holds a range; alike nodes are of one group, for it is in their kind."""
    import pulp

    for number, names in enumerate(capacities.exclusive_groups.values()):
        chosen = [choice.variable for choice in model.choices if choice.members[0] in names]
        if chosen:
            model.problem += pulp.lpSum(chosen) <= 1, f"group_{number}"


def exclude_loss(model: Model, placement: Mapping[str, LayerRange], lost: str) -> None:
    """Exclude placements that the loss of a node ends as it ends this one, of which no pipeline is left without it.

    Any other placement that goes on has a node that holds what none holds here, or another one that holds what the lost
    one does (a combinatorial Benders cut: Codato and Fischetti, 2006).
    """
    import pulp

    def count(choice: Choice) -> int:
        return sum(placement.get(name) == choice.held for name in choice.members if name != lost)

    alike = next(choice.members for choice in model.choices if lost in choice.members)
    (own,) = (c for c in model.choices if c.members == alike and c.held == placement[lost])
    others = [
        choice.variable
        for choice in model.choices
        if choice is not own and count(choice) == 0 and (len(alike) > 1 or choice.members != alike)
    ]
    spare = own.variable if count(own) == 0 and len(alike) > 1 else 0
    model.problem += 2 * pulp.lpSum(others) + spare >= 2


def solve(
    model: Model, limits: Limits, *, hint: Mapping[str, LayerRange] | None = None, report: Report | None = None
) -> Outcome:
    """Solve a model; a time limit or Ctrl-C ends it with the best found so far.

    Status, incumbent and bound are the solver's own: PuLP calls a run that its time limit stopped "Optimal".

    Args:
        model: the program.
        limits: of time and gap.
        hint: a placement to start from, of a model with choices; the solver finds its flows itself.
        report: called as HiGHS goes.
    """
    if limits.solver != HIGHS:
        return _solve_by_pulp(model, limits, hint)
    highspy = load_highspy()
    import numpy as np
    import pulp

    backend = pulp.HiGHS(msg=False, threads=limits.threads, timeLimit=limits.time_s, gapRel=limits.relative_gap)
    backend.createAndConfigureSolver(model.problem)
    highs = model.problem.solverModel
    highs.setOptionValue("random_seed", limits.seed)
    highs.setOptionValue("mip_abs_gap", 1e-9)
    backend.buildSolverModel(model.problem)
    if hint and model.choices:
        index = np.array([choice.variable.index for choice in model.choices], dtype=np.int32)
        value = [float(sum(hint.get(name) == c.held for name in c.members)) for c in model.choices]
        highs.setSolution(len(index), index, np.array(value))
    if report is not None:

        def heard(event: Any) -> None:
            report(-event.data_out.mip_primal_bound, -event.data_out.mip_dual_bound, event.data_out.running_time)

        highs.cbMipLogging.subscribe(heard)
        highs.cbMipImprovingSolution.subscribe(heard)
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
    bound = -info.mip_dual_bound if model.choices or model.decode else 0.0
    if end is End.OPTIMAL and has_solution:
        # The gap that remains is the tolerance; the bound never stands below the value that proves it.
        bound = max(bound, -info.objective_function_value)
    return Outcome(
        placement=model.placement(highs.getSolution().col_value) if has_solution else None,
        value=-info.objective_function_value if has_solution else 0.0,
        bound=0.0 if end is End.INFEASIBLE else bound,
        end=end,
        seconds=highs.getRunTime(),
    )


def _solve_by_pulp(model: Model, limits: Limits, hint: Mapping[str, LayerRange] | None) -> Outcome:
    began_s = time.perf_counter()
    start = {c.variable: float(sum((hint or {}).get(name) == c.held for name in c.members)) for c in model.choices}
    found = solve_with(
        model.problem,
        limits.solver,
        time_s=limits.time_s,
        threads=limits.threads,
        relative_gap=limits.relative_gap,
        start=start if hint else {},
    )
    variables = model.problem.variables()
    for number, variable in enumerate(variables):
        variable.index = number
    has_model = bool(model.choices or model.decode)
    values = [variable.varValue or 0.0 for variable in variables]
    return Outcome(
        placement=model.placement(values) if found.has_solution else None,
        value=found.value,
        bound=0.0 if found.is_infeasible or not has_model else found.bound,
        end=End.OPTIMAL if found.is_optimal else End.INFEASIBLE if found.is_infeasible else End.TIME_LIMIT,
        seconds=time.perf_counter() - began_s,
    )
