"""The steps of a search in their order: baselines at once, bounds, chains, programs, neighbours of the best."""

from __future__ import annotations

from collections.abc import Callable

from helixbench.solver.bounds.region_links import RegionBound
from helixbench.solver.placement import milp
from helixbench.solver.placement.annealing import annealed
from helixbench.solver.placement.balanced_stages import FEW_SIDE_BY_SIDE, MOST_SIDE_BY_SIDE, stacks
from helixbench.solver.placement.baselines import METHODS
from helixbench.solver.placement.binding import linked_size, links_bind
from helixbench.solver.placement.chains import widest_chain
from helixbench.solver.placement.descent import walk
from helixbench.solver.placement.incumbent import PROVEN, Search
from helixbench.solver.placement.leaders import roll_out_leaders
from helixbench.solver.placement.published import published_model
from helixbench.solver.placement.regions import regional_placements
from helixbench.solver.problem.capacity import Capacities

MAX_ASIDE_S = 10.0
"""Of each program where the largest flow is not what is asked for, only a bound and a place to start from."""

MOST_FOR_BOUND = 0.15
"""Of the time that is left, for the bound by configurations."""

MOST_FOR_STACKS = 0.25
"""Of the time that is left, for stages that fill evenly."""

WIDE_GAIN = 1.02
"""Of the best by means: what stages of more than two nodes side by side have to bring. Means take it that routing fills
all of them evenly, and are further off than this."""

MOST_ANNEALED = 150
"""Nodes. Above this a max-flow takes too long to ask for tens of thousands."""

COOLINGS = 10

MOST_AT_ONCE = 8_000
"""Variables of the node-by-node program up to which it ends so soon that it comes before annealing."""

MAX_LINKED_VARIABLES = 40_000
"""Above this the node-by-node program does not move in the time that people wait."""


def run_search(search: Search) -> str:
    """Search until a proof, the time limit or Ctrl-C; the status says which."""
    regions = {node.region for node in search.question.capacities.profile.nodes}
    steps: list[Callable[[Search], None]] = [_try_baselines, _bound_by_configurations, _try_regions]
    if not search.is_for_flow:
        steps.insert(1, _try_stacks)
    steps += [_try_chain, _prove_by_configurations] if len(regions) == 1 else [_prove_by_configurations]
    programs = [_solve_pooled, _solve_linked]
    is_small = linked_size(search.question.capacities, partial=search.question.partial) <= MOST_AT_ONCE
    steps += [*programs, _anneal] if is_small or len(regions) == 1 else [_anneal, *programs]
    if not search.is_for_flow:
        steps.append(_try_fewer_nodes)
    steps.append(walk)
    if not search.is_for_flow:
        steps.append(roll_out_leaders)
    try:
        for step in steps:
            if search.left() <= 0:
                return "time limit"
            step(search)
            if search.is_over:
                return "optimal"
    except KeyboardInterrupt:
        return "interrupted"
    if search.left() <= 0:
        return "time limit"
    is_optimal = search.best_score * (1 + PROVEN) >= search.bound  # what is expected never exceeds the max-flow
    return "optimal" if is_optimal else "search done"


def _try_baselines(search: Search) -> None:
    for name, rule in METHODS.items():
        search.offer(rule(search.question.capacities), f"{name} placement")


def _bound_by_configurations(search: Search) -> None:
    """Lower bounds than the work of all nodes: half a node holds no layer, and links between regions carry little."""
    end_s = search.elapsed() + MOST_FOR_BOUND * search.left()
    found = search.configurations.bound(
        low=search.best_flow, high=search.bound, may_go_on=lambda: search.elapsed() < end_s
    )
    search.lower_bound_to(found, "configurations of layers")
    between = RegionBound(search.question.capacities, search.links, partial=search.question.partial)
    found = between.bound(high=search.bound, may_go_on=lambda: search.elapsed() < end_s)
    search.lower_bound_to(found, "links between regions")


def _prove_by_configurations(search: Search) -> None:
    """Ask whether anything better than the best is excluded; the bisection stops a little above."""
    better = search.best_flow * (1 + PROVEN / 2)
    if search.best is not None and not search.is_proven() and search.configurations.excludes(better):
        search.lower_bound_to(better, "configurations of layers")


def solve_published(search: Search) -> str:
    """The published formulation alone, which knows of max-flow only."""
    question = search.question

    def report(incumbent: float, bound: float, _: float) -> None:
        search.tell("published formulation", incumbent=incumbent if incumbent > 0 else None, bound=bound)

    model = published_model(question.capacities, partial=question.partial)
    outcome = milp.solve(model, search.limits, report=report)
    search.offer(outcome.placement, "published formulation")
    if not any(question.capacities.is_time_shared(name) for name in question.capacities.nodes):
        search.lower_bound_to(outcome.bound, "published formulation")
    if outcome.status == "optimal":
        return "optimal" if search.is_proven() else "optimal of its own program"
    return {"time limit reached": "time limit", "interrupted by user": "interrupted"}.get(
        outcome.status, outcome.status
    )


def _try_regions(search: Search) -> None:
    """Chains of segments: regions by themselves, and in a row where that is worth the slow links between them."""
    is_large = len(search.question.capacities.nodes) > MOST_ANNEALED
    end_s = search.elapsed() + (0.7 if is_large else 0.4) * search.left()
    for placement in regional_placements(
        search.question.capacities,
        search.links,
        bound=search.bound,
        may_go_on=lambda: search.elapsed() < end_s and not search.is_over,
    ):
        search.offer(placement, "regions")


def _anneal(search: Search) -> None:
    """From the best placement, where links may bind and the network is small enough to ask about very often."""
    capacities = search.question.capacities
    if search.best is None or search.is_proven() or len(capacities.nodes) > MOST_ANNEALED:
        return
    end_s = search.elapsed() + (0.6 if search.is_for_flow else 0.2) * search.left()
    for placement in annealed(
        capacities,
        search.best,
        partial=search.question.partial,
        bound=search.bound,
        coolings=COOLINGS if search.is_for_flow else 1,
        may_go_on=lambda: search.elapsed() < end_s and not search.is_over,
        seed=search.limits.seed,
    ):
        search.offer(placement, "annealing")


def _try_chain(search: Search) -> None:
    """The widest single chain of stages, where no region is far from another."""
    capacities = search.question.capacities
    if search.is_proven():
        return
    found = widest_chain(capacities, bound=search.bound, seconds=0.1 * search.left())
    if found is not None:
        search.offer(found[1], "the widest chain")


def _solve_pooled(search: Search) -> None:
    """The aggregated program: exact where nothing between nodes binds, and a bound everywhere."""
    question = search.question
    is_exact = not links_bind(question.capacities, search.bound)
    model = milp.pooled_model(
        question.capacities, list(question.capacities.nodes), partial=question.partial, clip=search.bound
    )
    share = 0.7 if is_exact else 0.15
    _solve(search, model, share * search.left(), "program without links", is_exact=is_exact)


def _solve_linked(search: Search) -> None:
    """The node-by-node program, where links or network cards can bind and it is small enough to move."""
    question = search.question
    capacities = question.capacities
    if search.is_proven() or not links_bind(capacities, search.bound) or search.left() <= 0:
        return
    if linked_size(capacities, partial=question.partial) > MAX_LINKED_VARIABLES:
        return
    model = milp.linked_model(
        capacities, list(capacities.nodes), search.links, partial=question.partial, clip=search.bound
    )
    share = 0.7 if search.is_for_flow else 0.3
    _solve(search, model, share * search.left(), "program with links")


def _try_stacks(search: Search) -> None:
    """Chains of stages that admit alike; wide ones only where they are clearly better, for they need even routing."""
    capacities = search.question.capacities
    end_s = search.elapsed() + MOST_FOR_STACKS * search.left()
    for width, gain in ((FEW_SIDE_BY_SIDE, 1.0), (MOST_SIDE_BY_SIDE, WIDE_GAIN)):
        for placement in stacks(capacities, hop_s=_hop_seconds(capacities), most_side_by_side=width):
            if gain == 1.0:
                search.offer(placement, "stages that fill evenly")
            elif all(capacities.can_hold(name, held) for name, held in placement.items()):
                search.score(placement, above=gain * search.best_score, doing="stages that fill evenly")
            if search.elapsed() > end_s:
                return


def _hop_seconds(capacities: Capacities) -> float:
    """Latency of a hop, in the middle of the links that there are."""
    profile = capacities.profile
    latencies = sorted(link.latency_s for link in profile.links)
    if profile.default_link is not None:
        return profile.default_link.latency_s
    return latencies[len(latencies) // 2] if latencies else 0.0


def _try_fewer_nodes(search: Search) -> None:
    """Placements of the best without one node, and of each node and each few largest nodes alone."""
    capacities = search.question.capacities
    by_memory = sorted(capacities.nodes, key=lambda name: -capacities.max_layers(name))
    for count in range(1, min(len(by_memory), 6)):
        if search.left() <= 0:
            return
        chosen = by_memory[:count]
        if sum(capacities.max_layers(name) for name in chosen) < capacities.model.num_layers:
            continue
        model = milp.pooled_model(capacities, chosen, partial=search.question.partial, clip=search.bound)
        limits = milp.Limits(
            time_s=min(2.0, 0.05 * search.left()),
            threads=search.limits.threads,
            seed=search.limits.seed,
            relative_gap=0.005,
        )
        search.offer(milp.solve(model, limits).placement, f"program on {count} nodes")


def _solve(search: Search, model: milp.Model, seconds: float, doing: str, *, is_exact: bool = True) -> None:
    is_goal = search.is_for_flow
    limits = milp.Limits(
        time_s=max(0.1, seconds if is_goal else min(seconds, MAX_ASIDE_S)),
        threads=search.limits.threads,
        seed=search.limits.seed,
        relative_gap=PROVEN if is_goal else 0.01,
    )

    def report(incumbent: float, bound: float, _: float) -> None:
        is_ours = is_exact and 0 < incumbent <= search.bound
        search.tell(doing, incumbent=incumbent if is_ours else None, bound=bound)

    outcome = milp.solve(model, limits, hint=search.best, report=report)
    search.offer(outcome.placement, doing)
    search.lower_bound_to(outcome.bound, doing)
    if outcome.status == "interrupted by user":
        raise KeyboardInterrupt
