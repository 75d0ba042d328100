"""The search for a placement: baselines at once, then the programs, then neighbours of the best, until time is up.

Whatever ends it - proof, time limit or Ctrl-C - the best plan so far is returned, with the bound proven so far.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from profiler.cluster_profile import COORDINATOR, ClusterProfile
from profiler.errors import InputError

from . import milp
from .assemble import Objective, Question, assemble, best_decode_batch, carrying, is_followed, used_nodes
from .baselines import METHODS
from .bounds import work_bound
from .capacity import Capacities
from .chains import widest_chain
from .checker import require_sound
from .expected import predict_means
from .feasibility import why_infeasible
from .neighbours import neighbours
from .network import LinkTable
from .plan import Infeasible, LayerRange, Plan, SolverFacts
from .progress import OnProgress, Progress
from .published import PUBLISHED, published_model
from .regions import regional_placements
from .stacks import stacks
from .verdict import verdicts
from .workload import Workload

Placement = dict[str, LayerRange]

MAX_ASIDE_S = 10.0
"""Of each program where the largest flow is not what is asked for, only a bound and a place to start from."""

PROVEN = 1e-6
"""Relative gap at which a plan counts as optimal."""

MAX_ROLLED_OUT = 8
"""So many of the placements that means alone find best are compared by following their groups of requests."""

VAIN_KICKS_PER_NODE = 5
"""So many starts away from the best for each node, without finding a better one, end the search."""

LEADING = 0.7
"""Of the best by means alone: what may still turn out to be the best when requests are followed."""

MAX_LINKED_VARIABLES = 40_000
"""Above this the node-by-node program does not move in the time that people wait."""


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
        on_progress: called as the search goes.

    Raises:
        InputError: no such method or node, or an option out of range.
    """
    _require_options(method, time_limit_s, threads, concurrency)
    require_pins(profile, pins or {})
    capacities = Capacities(profile, workload, concurrency=concurrency, pins=pins)
    reason = why_infeasible(capacities)
    if reason is not None:
        return Infeasible(reason=reason)
    question = Question(capacities, objective, partial)
    limits = milp.Limits(time_s=time_limit_s, threads=threads, seed=seed)
    search = Search(question, limits, on_progress or (lambda _: None))
    if method in METHODS:
        search.offer(METHODS[method](capacities), f"{method} placement")
        status = "done" if search.best is not None else ""
    elif method == PUBLISHED:
        status = _solve_published(search)
    else:
        search.offer(start, "the placement to start from")
        status = run_search(search)
    if search.best is None:
        return Infeasible(reason=_why_nothing(search, method, status))
    facts = SolverFacts(
        method=method, backend=_backend(), seconds=search.elapsed(), status=status, seed=seed, threads=threads
    )
    plan = assemble(question, search.best, bound=search.bound, facts=facts, notes=verdicts(question, search.best))
    require_sound(profile, plan)
    return plan


@dataclass
class Search:
    """State of one search. It owns the incumbent and the bound; both only improve."""

    question: Question
    limits: milp.Limits
    on_progress: OnProgress
    started: float = field(default_factory=time.perf_counter)
    best: Placement | None = None
    best_score: float = 0.0
    best_flow: float = 0.0
    bound: float = 0.0
    seen: set[tuple[tuple[str, LayerRange], ...]] = field(default_factory=set)
    leaders: list[tuple[float, float, Placement]] = field(default_factory=list)  # (score, max-flow, placement) of each

    def __post_init__(self) -> None:
        self.bound = work_bound(self.question.capacities, partial=self.question.partial)
        self.links = LinkTable(self.question.capacities.profile)

    def elapsed(self) -> float:
        """Seconds since the search began."""
        return time.perf_counter() - self.started

    def left(self) -> float:
        """Seconds until the time limit."""
        return self.limits.time_s - self.elapsed()

    def is_proven(self) -> bool:
        """Whether no placement can have a larger max-flow than the best."""
        return self.best is not None and self.bound <= self.best_flow * (1 + PROVEN)

    def offer(self, placement: Mapping[str, LayerRange] | None, doing: str) -> bool:
        """Take a placement if it scores better than the best; whether it did."""
        if not placement:
            return False
        if any(not self.question.capacities.can_hold(name, held) for name, held in placement.items()):
            return False
        key = tuple(sorted(placement.items()))
        if key in self.seen:
            return False
        self.seen.add(key)
        before = self.best_score
        is_throughput = self.question.objective == "throughput"
        self.score(placement, above=LEADING * before if is_throughput else before, doing=doing)
        return self.best_score > before

    def score(self, placement: Mapping[str, LayerRange], *, above: float, doing: str) -> float | None:
        """Its score if that is more than ``above``, else ``None``; taken as the best where it is."""
        if self._most_at_scarcest_layer(placement) <= above * (1 + PROVEN):
            return None
        flow = carrying(self.question, placement, links=self.links)
        if flow.tokens_per_s <= above * (1 + PROVEN):
            return None  # what is expected never exceeds the max-flow
        score = flow.tokens_per_s
        if self.question.objective == "throughput":
            held = {name: placement[name] for name in used_nodes(placement, flow)}
            capacities, asked = self.question.capacities, self.question.concurrency
            score = predict_means(capacities, held, flow.links, asked, links=self.links).total_tokens_per_s
            self.leaders.append((score, flow.tokens_per_s, held))
        if score <= above * (1 + PROVEN):
            return None
        if score > self.best_score * (1 + PROVEN):
            self.take(score, flow.tokens_per_s, dict(placement))
            self.tell(doing)
        return score

    def _most_at_scarcest_layer(self, placement: Mapping[str, LayerRange]) -> float:
        """What the nodes of the layer that has least can do in all; no flow exceeds it."""
        capacities = self.question.capacities
        change = [0.0] * (capacities.model.num_layers + 1)
        for name, held in placement.items():
            entries = range(held.start, held.end) if capacities.is_time_shared(name) else (held.start,)
            most = max(capacities.tokens_per_s(name, held, entry) for entry in entries)
            change[held.start] += most
            change[held.end] -= most
        return min(itertools.accumulate(change[:-1]))

    def take(self, score: float, flow: float, placement: Placement) -> None:
        """Make a placement the best."""
        self.best, self.best_score, self.best_flow = placement, score, flow

    def lower_bound_to(self, bound: float, doing: str) -> None:
        """Take a proven upper bound if it is lower than the one at hand."""
        if bound < self.bound:
            self.bound = bound
            self.tell(doing)

    def tell(self, doing: str, *, incumbent: float | None = None, bound: float | None = None) -> None:
        """Report where the search is."""
        known = [value for value in (incumbent, self.best_flow) if value]
        self.on_progress(
            Progress(
                seconds=self.elapsed(),
                incumbent_tokens_per_s=max(known) if known else None,
                bound_tokens_per_s=min(self.bound, bound) if bound is not None else self.bound,
                doing=doing,
            )
        )


def run_search(search: Search) -> str:
    """Search until a proof, the time limit or Ctrl-C; the status says which."""
    steps: list[Callable[[Search], None]] = [_try_baselines, _solve_pooled, _solve_linked]
    if len({node.region for node in search.question.capacities.profile.nodes}) > 1:
        steps.insert(1, _try_regions)
    else:
        steps.insert(1, _try_chain)
    if search.question.objective == "throughput":
        steps += [_try_stacks, _try_fewer_nodes]
    steps.append(_walk)
    if search.question.objective == "throughput":
        steps.append(_roll_out_leaders)
    try:
        for step in steps:
            if search.left() <= 0:
                return "time limit"
            step(search)
            if search.is_proven() and search.question.objective == "max-flow":
                return "optimal"
    except KeyboardInterrupt:
        return "interrupted"
    if search.left() <= 0:
        return "time limit"
    return "optimal" if search.is_proven() else "search done"


def _try_baselines(search: Search) -> None:
    for name, rule in METHODS.items():
        search.offer(rule(search.question.capacities), f"{name} placement")


def _solve_published(search: Search) -> str:
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
    """Regions by themselves, and in a row where that is worth the slow links between them."""
    share_s = 0.4 * search.left()
    limits = milp.Limits(time_s=share_s, threads=search.limits.threads, seed=search.limits.seed, relative_gap=0.01)
    for placement in regional_placements(search.question.capacities, limits):
        search.offer(placement, "regions")


def _try_chain(search: Search) -> None:
    """The widest single chain of stages."""
    question = search.question
    regions = sorted({node.region for node in question.capacities.profile.nodes})
    found = widest_chain(
        question.capacities, regions, bound=search.bound, link_tokens_per_s=(), seconds=0.1 * search.left()
    )
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
    share = 0.7 if question.objective == "max-flow" else 0.3
    _solve(search, model, share * search.left(), "program with links")


def _try_stacks(search: Search) -> None:
    """Chains of stages that carry and admit alike."""
    capacities = search.question.capacities
    for placement in stacks(capacities, hop_s=_hop_seconds(capacities)):
        if all(capacities.can_hold(name, held) for name, held in placement.items()):
            search.offer(placement, "stages that fill evenly")
        if search.left() <= 0:
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


def _walk(search: Search) -> None:
    """Better neighbours until there are none; then again from the best, a few moves away from it."""
    if search.best is None:
        return
    end_s = search.limits.time_s if search.question.objective == "max-flow" else 0.7 * search.limits.time_s
    rng = random.Random(search.limits.seed)
    _descend(search, search.best, search.best_score, end_s)
    vain = 0
    most_vain = VAIN_KICKS_PER_NODE * len(search.question.capacities.nodes)
    while vain < most_vain and search.elapsed() < end_s and not _done(search):
        before = search.best_score
        kicked = _kick(search, rng)
        score = search.score(kicked, above=0.5 * before, doing="neighbours")
        if score is not None:
            _descend(search, kicked, score, end_s)
        vain = 0 if search.best_score > before else vain + 1


def _descend(search: Search, start: Placement, score: float, end_s: float) -> None:
    """From one placement to better neighbours, the first that is better each time."""
    here, is_better = start, True
    while is_better and not _done(search):
        is_better = False
        for candidate in neighbours(search.question.capacities, here):
            if search.elapsed() >= end_s:
                return
            found = search.score(candidate, above=score, doing="neighbours")
            if found is not None:
                here, score, is_better = candidate, found, True
                break


def _kick(search: Search, rng: random.Random) -> Placement:
    """The best with a few random neighbouring moves made on it."""
    assert search.best is not None
    here = search.best
    for _ in range(rng.randint(2, 4)):
        around = list(neighbours(search.question.capacities, here))
        if around:
            here = rng.choice(around)
    return here


def _roll_out_leaders(search: Search) -> None:
    """Compare the placements that means alone find best by following their groups of requests; keep the best."""
    question = search.question
    rolled: list[tuple[float, float, Placement]] = []
    for _, flow, placement in _leaders(search):
        if rolled and search.left() <= 0:
            break
        carried = carrying(question, placement, spread=True, links=search.links)
        held = {name: placement[name] for name in used_nodes(placement, carried)}
        if not is_followed(question, held, carried, question.concurrency):
            continue
        _, expected = best_decode_batch(question, held, carried, thorough=False)
        rolled.append((expected.total_tokens_per_s, flow, placement))
    if rolled:
        search.take(*max(rolled, key=lambda item: item[0]))
        search.tell("following requests through the best plans")


def _leaders(search: Search) -> list[tuple[float, float, Placement]]:
    """The best placement by means of each set of nodes, best first: near copies of the best would crowd out others."""
    by_nodes: dict[frozenset[str], tuple[float, float, Placement]] = {}
    for leader in search.leaders:
        nodes = frozenset(leader[2])
        if nodes not in by_nodes or leader[0] > by_nodes[nodes][0]:
            by_nodes[nodes] = leader
    return sorted(by_nodes.values(), key=lambda leader: -leader[0])[:MAX_ROLLED_OUT]


def _done(search: Search) -> bool:
    return search.question.objective == "max-flow" and search.is_proven()


def _solve(search: Search, model: milp.Model, seconds: float, doing: str, *, is_exact: bool = True) -> None:
    is_goal = search.question.objective == "max-flow"
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


def links_bind(capacities: Capacities, bound: float) -> bool:
    """Whether a link or a network card could limit a flow of at most ``bound`` tokens/s."""
    profile = capacities.profile
    table = LinkTable(profile)
    names = [COORDINATOR, *capacities.nodes]
    if profile.default_link is None:
        return True
    ends = {(link.src, link.dst) for link in profile.links}
    slowest = [(COORDINATOR, names[-1]), *ends]
    if any((names[1], other) not in ends for other in names[2:]) and len(names) > 2:
        slowest.append((names[1], names[2]))
    for src, dst in slowest:
        bandwidth = table.bandwidth(src, dst)
        if bandwidth is None or bandwidth / profile.bytes_per_token(src, dst) < bound:
            return True
    if profile.default_link.bandwidth_bytes_per_s / profile.model.activation_bytes_per_token < bound:
        return True
    cards = [(node.nic_out_bytes_per_s, node.nic_in_bytes_per_s) for node in profile.nodes]
    most = max(profile.model.activation_bytes_per_token, profile.model.token_bytes)
    if any(card is not None and card / most < bound for pair in cards for card in pair):
        return True
    coordinator = profile.coordinator
    return any(
        card is not None and card / profile.model.token_bytes < bound
        for card in (coordinator.nic_out_bytes_per_s, coordinator.nic_in_bytes_per_s)
    )


def linked_size(capacities: Capacities, *, partial: bool) -> int:
    """Variables of the node-by-node program."""
    size = 0
    for name in capacities.nodes:
        for held in milp.ranges_of(capacities, name):
            size += 1 + (held.num_layers if partial else 1)
    return size + len(capacities.nodes) ** 2 * capacities.model.num_layers


def _backend() -> str:
    from importlib.metadata import version

    return f"PuLP {version('pulp')}, HiGHS {version('highspy')}"


def _require_options(method: str, time_limit_s: float, threads: int, concurrency: int | None) -> None:
    known = ("auto", *METHODS, PUBLISHED)
    if method not in known:
        raise InputError(f"--method {method}: no such method; choose from {', '.join(known)}")
    if time_limit_s <= 0:
        raise InputError(f"--time-limit-s {time_limit_s}: need more than 0 seconds")
    if threads < 1:
        raise InputError(f"--threads {threads}: need at least 1")
    if concurrency is not None and concurrency < 1:
        raise InputError(f"--concurrency {concurrency}: need at least 1 request in flight")


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
