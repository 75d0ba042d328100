"""The search for a placement: its steps in their order, from rules that cost nothing to local search until time is up.

Each step offers placements to the incumbent or lowers the bound (``incumbent.Search``). For the objective ``max-flow``
the search ends as soon as the two meet. For ``throughput`` the max-flow is only a bound on the score, so the last step
simulates the placements that score best analytically and keeps the best of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.bounds.region_links import RegionBound
from helixbench.solver.expected.simulated import best_limits
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.flow.survival import indispensable
from helixbench.solver.placement import milp
from helixbench.solver.placement.annealing import annealed
from helixbench.solver.placement.balanced_stages import FEW_SIDE_BY_SIDE, MOST_SIDE_BY_SIDE, stacks
from helixbench.solver.placement.baselines import METHODS
from helixbench.solver.placement.chains import widest_chain
from helixbench.solver.placement.incumbent import PROVEN, Candidate, Search, simulation_budget
from helixbench.solver.placement.local_search import search_neighbourhood
from helixbench.solver.placement.published import PUBLISHED, published_model
from helixbench.solver.placement.regions import regional_placements
from helixbench.solver.placement.segments import largest_region
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import SearchStatus

MAX_ASIDE_S = 10.0
"""Time limit of each program where max-flow is not the objective, only a bound and a start."""

MOST_FOR_BOUND = 0.15
"""Share of the remaining time for the bound by configurations."""

MOST_FOR_STACKS = 0.25
"""Share of the remaining time for stages that fill evenly."""

WIDE_GAIN = 1.02
"""Factor on the best score that stages of more than two nodes side by side have to reach: the analytical score assumes
that routing fills all of them evenly, and its error is larger than this."""

MOST_ANNEALED = 150
"""Nodes up to which tens of thousands of max-flows can be computed."""

COOLINGS = 10

ONE_REGION = 0.9
"""Share of the nodes in the largest region from which the search goes as if there were no other."""

MOST_AT_ONCE = 8_000
"""Variables of the node-by-node program up to which it is fast enough to come before annealing."""

MAX_LINKED_VARIABLES = 40_000
"""Variables of the node-by-node program above which it finds nothing in the time that people wait."""

MOST_SIMULATED = 16
"""Number of placements to simulate of those with the best analytical score, and of those with the largest flow."""


def run_search(search: Search, method: str) -> SearchStatus:
    """Search by a method until a proof, the time limit or Ctrl-C."""
    try:
        if method in METHODS:
            search.offer(METHODS[method](search.capacities.with_one_of_each_group()), f"{method} placement")
            return "not searched"
        if method == PUBLISHED:
            return _solve_published(search)
        is_out_of_time = False
        for step in _steps(search):
            is_out_of_time = search.left() <= 0
            if is_out_of_time:
                break
            step(search)
            if search.is_over:
                return "optimal"
        if not search.is_for_flow:
            _simulate_candidates(search)
    except KeyboardInterrupt:
        return "interrupted"
    if is_out_of_time or search.left() <= 0:
        return "time limit"
    # What is expected never exceeds the max-flow, so a score at the bound is optimal for either objective.
    return "optimal" if search.best_score * (1 + PROVEN) >= search.bound else "search done"


def _steps(search: Search) -> Iterator[Callable[[Search], None]]:
    capacities = search.capacities
    in_largest = list(capacities.regions.values()).count(largest_region(capacities))
    is_one_region = in_largest >= ONE_REGION * len(capacities.nodes)
    yield _try_baselines
    if not search.is_for_flow:
        yield _try_stacks
    yield _bound_by_configurations
    yield _try_regions
    if is_one_region and not capacities.survive:
        yield _try_chain
    yield _prove_by_configurations
    # Programs find more than annealing does where links hardly bind or the program is small; elsewhere they start from
    # what annealing found.
    is_small = linked_size(capacities) <= MOST_AT_ONCE
    programs = (_solve_pooled, _solve_linked)
    yield from (*programs, _anneal) if is_small or is_one_region else (_anneal, *programs)
    if not search.is_for_flow:
        yield _try_fewer_nodes
    yield search_neighbourhood


def _try_baselines(search: Search) -> None:
    capacities = search.capacities.with_one_of_each_group()
    for name, rule in METHODS.items():
        search.offer(rule(capacities), f"{name} placement")


def _bound_by_configurations(search: Search) -> None:
    """Lower bounds than the work of all nodes: half a node holds no layer, and links between regions carry little."""
    end_s = search.elapsed() + MOST_FOR_BOUND * search.left()
    found = search.configurations.bound(
        low=search.best_flow, high=search.bound, may_go_on=lambda: search.elapsed() < end_s
    )
    search.lower_bound_to(found, "configurations of layers")
    between = RegionBound(search.capacities)
    found = between.bound(high=search.bound, may_go_on=lambda: search.elapsed() < end_s)
    search.lower_bound_to(found, "links between regions")


def _prove_by_configurations(search: Search) -> None:
    """Ask whether anything better than the best is excluded: the bisection of the bound stops a little above."""
    better = search.best_flow * (1 + PROVEN / 2)
    if search.best is not None and not search.is_proven() and search.configurations.excludes(better):
        search.lower_bound_to(better, "configurations of layers")


def _try_stacks(search: Search) -> None:
    """Chains of stages that admit alike; wide ones only where they are clearly better, for they need even routing."""
    capacities = search.capacities
    end_s = search.elapsed() + MOST_FOR_STACKS * search.left()
    for width, gain in ((FEW_SIDE_BY_SIDE, 1.0), (MOST_SIDE_BY_SIDE, WIDE_GAIN)):
        for placement in stacks(capacities, hop_s=_median_latency_s(capacities), most_side_by_side=width):
            if gain == 1.0:
                search.offer(placement, "stages that fill evenly")
            elif all(capacities.can_hold(name, held) for name, held in placement.items()):
                search.score(placement, above=gain * search.best_score, doing="stages that fill evenly")
            if search.elapsed() > end_s:
                return


def _median_latency_s(capacities: Capacities) -> float:
    profile = capacities.profile
    if profile.default_link is not None:
        return profile.default_link.latency_s
    latencies = sorted(link.latency_s for link in profile.links)
    return latencies[len(latencies) // 2] if latencies else 0.0


def _try_regions(search: Search) -> None:
    """Chains of segments: regions by themselves, and in a row where that is worth the slow links between them."""
    is_large = len(search.capacities.nodes) > MOST_ANNEALED
    end_s = search.elapsed() + (0.7 if is_large else 0.4) * search.left()
    for placement in regional_placements(
        search.capacities,
        bound=search.bound,
        may_go_on=lambda: search.elapsed() < end_s and not search.is_over,
    ):
        search.offer(placement, "regions")


def _try_chain(search: Search) -> None:
    """The widest single chain of blocks in one region: with many kinds of nodes it finds more than segments do."""
    if not search.is_proven():
        found = widest_chain(search.capacities, bound=search.bound, seconds=0.1 * search.left())
        search.offer(found, "the widest chain")


def _anneal(search: Search) -> None:
    """From the best placement, where links may bind and the network is small enough to ask about very often."""
    capacities = search.capacities
    if search.best is None or search.is_proven() or len(capacities.nodes) > MOST_ANNEALED:
        return
    end_s = search.elapsed() + (0.6 if search.is_for_flow else 0.2) * search.left()
    for placement in annealed(
        capacities,
        search.best,
        bound=search.bound,
        coolings=COOLINGS if search.is_for_flow else 1,
        may_go_on=lambda: search.elapsed() < end_s and not search.is_over,
        seed=search.limits.seed,
    ):
        search.offer(placement, "annealing")


def _solve_pooled(search: Search) -> None:
    """The aggregated program: exact where nothing between nodes binds, and a bound everywhere."""
    capacities = search.capacities
    is_exact = not links_bind(capacities, search.bound)
    model = milp.pooled_model(capacities, list(capacities.nodes), clip=search.bound)
    # Where links bind, the program is a relaxation: worth a look for its bound, not most of the time.
    share = 0.7 if is_exact else 0.15
    _solve(search, model, share * search.left(), "program without links", is_exact=is_exact)


def _solve_linked(search: Search) -> None:
    """The node-by-node program, where links or NICs can bind and it is small enough to move."""
    capacities = search.capacities
    if search.is_proven() or not links_bind(capacities, search.bound) or search.left() <= 0:
        return
    if linked_size(capacities) > MAX_LINKED_VARIABLES:
        return
    model = milp.linked_model(capacities, list(capacities.nodes), clip=search.bound)
    share = 0.7 if search.is_for_flow else 0.3
    _solve(search, model, share * search.left(), "program with links")


def _solve(search: Search, model: milp.Model, seconds: float, doing: str, *, is_exact: bool = True) -> None:
    is_goal = search.is_for_flow
    limits = milp.Limits(
        time_s=max(0.1, seconds if is_goal else min(seconds, MAX_ASIDE_S)),
        threads=search.limits.threads,
        seed=search.limits.seed,
        relative_gap=PROVEN if is_goal else 0.01,
        solver=search.limits.solver,
    )

    def report(incumbent: float, bound: float, _: float) -> None:
        is_ours = is_exact and 0 < incumbent <= search.bound
        search.tell(doing, incumbent=incumbent if is_ours else None, bound=bound)

    end_s = search.elapsed() + limits.time_s
    while True:
        outcome = milp.solve(model, limits, hint=search.best, report=report)
        search.offer(outcome.placement, doing)
        search.lower_bound_to(outcome.bound, doing)
        if outcome.end is milp.End.INTERRUPTED:
            raise KeyboardInterrupt
        left_s = end_s - search.elapsed()
        if (
            not outcome.placement
            or left_s <= 0
            or search.is_over
            or not _exclude_losses(search, model, outcome, is_exact)
        ):
            return
        limits = replace(limits, time_s=left_s)


def _exclude_losses(search: Search, model: milp.Model, outcome: milp.Outcome, is_linked: bool) -> bool:
    """Exclude from a program what its placement does not survive; whether there is any such loss."""
    capacities, placement = search.capacities, outcome.placement
    if not capacities.survive or not placement:
        return False
    lost = list(indispensable(capacities, placement, all_connected=not is_linked))
    for name in lost:
        milp.exclude_loss(model, placement, name)
    return bool(lost)


def _solve_published(search: Search) -> SearchStatus:
    """The published formulation alone, which knows of max-flow only."""
    capacities = search.capacities

    def report(incumbent: float, bound: float, _: float) -> None:
        search.tell("published formulation", incumbent=incumbent if incumbent > 0 else None, bound=bound)

    model = published_model(capacities)
    outcome = milp.solve(model, search.limits, report=report)
    search.offer(outcome.placement, "published formulation")
    if not any(capacities.is_measured(name) for name in capacities.nodes):
        search.lower_bound_to(outcome.bound, "published formulation")
    if outcome.end is milp.End.TIME_LIMIT:
        return "time limit"
    if outcome.end is milp.End.INTERRUPTED:
        return "interrupted"
    return "optimal" if search.is_proven() else "search done"


def _try_fewer_nodes(search: Search) -> None:
    """Each few largest nodes alone: short pipelines have short rounds."""
    capacities = search.capacities
    by_memory = sorted(capacities.nodes, key=lambda name: -capacities.max_layers(name))
    for count in range(1, min(len(by_memory), 6)):
        if search.left() <= 0:
            return
        chosen = by_memory[:count]
        if sum(capacities.max_layers(name) for name in chosen) < capacities.model.num_layers:
            continue
        model = milp.pooled_model(capacities, chosen, clip=search.bound)
        limits = milp.Limits(
            time_s=min(2.0, 0.05 * search.left()),
            threads=search.limits.threads,
            seed=search.limits.seed,
            relative_gap=0.005,
            solver=search.limits.solver,
        )
        search.offer(milp.solve(model, limits).placement, f"program on {count} nodes")


def _simulate_candidates(search: Search) -> None:
    """Simulate the placements with the best scores and the largest flows; keep the one that delivers most.

    The best analytical score stays where one of them takes too long to simulate: short pipelines are simulated soonest,
    and would otherwise be compared with their like alone.
    """
    capacities = search.capacities
    simulated: list[Candidate] = []
    budget = simulation_budget(search.limits.time_s, search.objective)
    for candidate in _chosen_candidates(search.candidates):
        flow = max_flow(capacities, candidate.placement, spread=True)
        found = best_limits(capacities, flow.used(candidate.placement), flow, budget, thorough=False)
        if found is None:
            if budget.left:
                return
            break
        simulated.append(candidate._replace(score=found.expected.total_tokens_per_s))
    if len(simulated) > 1:
        search.take(max(simulated, key=lambda candidate: candidate.score))
        search.tell("simulating the best placements")


def _chosen_candidates(candidates: list[Candidate]) -> list[Candidate]:
    """The best score of each set of nodes, the best scores, the largest flows: each in its order, and once."""
    by_score = sorted(candidates, key=lambda candidate: -candidate.score)
    by_flow = sorted(candidates, key=lambda candidate: -candidate.flow)
    by_nodes: dict[frozenset[str], Candidate] = {}
    for candidate in by_score:
        by_nodes.setdefault(frozenset(candidate.placement), candidate)
    chosen = list(by_nodes.values())[: MOST_SIMULATED // 2]
    for pair in zip(by_score, by_flow, strict=True):
        if len(chosen) >= 2 * MOST_SIMULATED:
            break
        chosen += [candidate for candidate in pair if candidate not in chosen]
    return chosen


def links_bind(capacities: Capacities, bound: float) -> bool:
    """Whether a link or a NIC could limit a flow of at most ``bound`` tokens/s."""
    profile, model = capacities.profile, capacities.model
    if profile.default_link is None:
        return True  # some nodes are not connected at all
    largest = max(model.activation_bytes_per_token, model.token_bytes)
    carried = [profile.default_link.bandwidth_bytes_per_s / largest]
    carried += [k.bandwidth_bytes_per_s / profile.bytes_per_token(k.src, k.dst) for k in profile.links]
    for name in (COORDINATOR, *capacities.nodes):
        size = model.token_bytes if name == COORDINATOR else largest
        carried += [nic / size for nic in capacities.links.nics(name) if nic is not None]
    return min(carried) < bound


def linked_size(capacities: Capacities) -> int:
    """Variables of the node-by-node program."""
    size = len(capacities.nodes) ** 2 * capacities.model.num_layers
    for name in capacities.nodes:
        for held in milp.ranges_of(capacities, name):
            size += 1 + len(capacities.entries(held))
    return size
