"""What a placement is expected to deliver, analytically: fast enough to be asked thousands of times in a search.

A round is the way of one output token through all stages and back. A request in flight is always somewhere on it, so
with ``N`` in flight ``N / round_s`` output tokens/s come out (Little's law). Requests travel in groups, each batched at
every node that it passes, with the chunks of prompts that come with it. A round is no shorter than the way of a group
through all nodes, and no shorter than the work of any node for all groups; where the two are about equal, groups wait
for each other, the more so where they come from several nodes and not in turn. How many groups there are is chosen with
the limits on iterations, so the best number counts. The simulation (``simulated``) has the groups themselves; this
stands in for it in the search (``benchmarks/solver_ranking.py`` compares the two).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from helixbench.profiler.cluster import COORDINATOR
from helixbench.profiler.cost.model import BatchShape
from helixbench.solver.flow.pipelines import pipelines_of
from helixbench.solver.problem.capacity import Capacities, admitted_requests, batch_shape
from helixbench.solver.problem.plan import Expected, LayerRange, LinkFlow, Pipeline

GROUPS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Numbers of groups that are tried, in units of the stages of a pipeline."""

ROUND_NORM = 6.0
"""Exponent of the norm that joins the lower bounds of a round: with both equal it is 2^(1/6) as long as either."""

WAIT_ALONE, WAIT_MIXED, WAIT_UNEVEN = 0.2, 4.0, 3.0
"""Iterations that a group waits at a node that is always busy: where all come from one node in groups that keep their
distance; in addition where they come from many; and where they have passed different numbers of nodes before. These and
the norm are fitted to the simulations of ``benchmarks/solver_ranking.py``."""

LEAST_FREE = 0.1
"""Share of its time that a link is taken to be free for a group that waits behind prompts."""

FIXED_POINT_STEPS = 6


WeightedPipelines: TypeAlias = Sequence[tuple[Pipeline, float]]
"""Pipelines with their tokens/s."""


@dataclass(frozen=True)
class Visit:
    """Requests entering one node at one layer: ``share`` of all requests."""

    name: str
    entry: int
    share: float


def predict_analytically(
    capacities: Capacities,
    placement: Mapping[str, LayerRange],
    flows: Sequence[LinkFlow],
    concurrency: int | None,
) -> Expected:
    """Expected throughput and latency, under the best limits on iterations.

    Args:
        capacities: of the cluster for the workload.
        placement: node -> layer range.
        flows: weights of the pipelines; shares of requests are taken from them, not totals.
        concurrency: requests in flight; ``None`` for as many as the KV caches hold.
    """
    visits = visits_of(placement, flows)
    weighted = pipelines_of(placement, flows)
    admitted = kv_requests(capacities, placement, weighted)
    in_flight = admitted if concurrency is None else min(concurrency, admitted)
    stages = sum(visit.share for visit in visits)
    waits = _waits(weighted)
    rounds = [
        _round(capacities, placement, visits, flows, waits, in_flight=in_flight, size=in_flight / (units * stages))
        for units in GROUPS
    ]
    best = min(rounds, key=lambda one: one.seconds)
    mix = capacities.mix
    carried = sum(flow.flow_tokens_per_s for flow in flows if flow.src == COORDINATOR)
    round_s = max(best.seconds, in_flight * mix.tokens_per_output / carried)
    tokens_per_s = in_flight / round_s
    prompts_s = sum(visit.share * prompt_s(capacities, visit.name, placement[visit.name]) for visit in visits)
    return Expected(
        concurrency=in_flight if concurrency is None else concurrency,
        total_tokens_per_s=tokens_per_s * mix.tokens_per_output,
        output_tokens_per_s=tokens_per_s,
        ttft_s=best.alone_s / 2 + prompts_s,
        tpot_s=round_s,
        in_flight=float(in_flight),
        node_busy={name: min(1.0, busy_s / round_s) for name, busy_s in best.busy_s.items()},
    )


@dataclass(frozen=True)
class _Round:
    """Seconds of a round; of a group's way if none is in its way; node -> seconds of its work in a round."""

    seconds: float
    alone_s: float
    busy_s: Mapping[str, float]


def _waits(weighted: WeightedPipelines) -> dict[str, float]:
    """Node -> iterations that a group waits there if the node is always busy."""
    before: dict[str, dict[str, float]] = {}  # node -> the one before it -> flow
    after_hops: dict[str, dict[int, float]] = {}  # node -> hops before it -> flow
    for hops, weight in weighted:
        came_from = COORDINATOR
        for number, hop in enumerate(hops):
            into = before.setdefault(hop.node, {})
            into[came_from] = into.get(came_from, 0.0) + weight
            at = after_hops.setdefault(hop.node, {})
            at[number] = at.get(number, 0.0) + weight
            came_from = hop.node
    return {
        name: WAIT_ALONE + WAIT_MIXED * _mixing(into.values()) + WAIT_UNEVEN * _mixing(after_hops[name].values())
        for name, into in before.items()
    }


def _mixing(parts: Collection[float]) -> float:
    """Probability that two tokens of a flow come from different parts of it."""
    total = sum(parts)
    return 1 - sum((part / total) ** 2 for part in parts)


def _round(
    capacities: Capacities,
    placement: Mapping[str, LayerRange],
    visits: Sequence[Visit],
    flows: Sequence[LinkFlow],
    waits: Mapping[str, float],
    *,
    in_flight: int,
    size: float,
) -> _Round:
    """The round of groups of that many requests, or of single ones or of all that are in flight."""
    mix, size = capacities.mix, min(max(1.0, size), float(in_flight))
    others = 1 - size / in_flight  # alone in the cluster nobody waits for others
    passing: dict[str, float] = {}  # node -> share of requests that pass it, whatever their entry layer
    for visit in visits:
        passing[visit.name] = passing.get(visit.name, 0.0) + visit.share
    alone_s = 0.0
    busy_s: dict[str, float] = {}
    waits_s: dict[str, float] = {}  # node -> seconds that a round waits there if the node is always busy
    for visit in visits:
        here = in_flight * passing[visit.name]  # sequences that pass the node in a round
        seconds, together = _iteration(capacities, placement[visit.name], visit, min(size, max(1.0, here)))
        alone_s += visit.share * seconds
        busy_s[visit.name] = busy_s.get(visit.name, 0.0) + in_flight * visit.share / together * seconds
        wait_s = others * visit.share * seconds * waits[visit.name]
        waits_s[visit.name] = waits_s.get(visit.name, 0.0) + wait_s
    most_s = max(busy_s.values())
    total = sum(flow.flow_tokens_per_s for flow in flows if flow.src == COORDINATOR)
    links: list[tuple[float, float, float]] = []  # (share of requests, seconds in use in a round, seconds of a prompt)
    for flow in flows:
        share, token_s = flow.flow_tokens_per_s / total, 1 / flow.capacity_tokens_per_s
        latency_s = capacities.links.latency_s(flow.src, flow.dst) or 0.0
        alone_s += share * (latency_s + max(1.0, size * share) * token_s)
        links.append((share, in_flight * share * mix.tokens_per_output * token_s, mix.prompt_tokens * token_s))
    prompts = mix.prompt_tokens / mix.output_tokens / mix.tokens_per_output  # share of all tokens
    most_s = max(most_s, *(used_s for _, used_s, _ in links))
    round_s = alone_s + most_s
    for _ in range(FIXED_POINT_STEPS):
        waiting_s = sum(wait_s * min(1.0, busy_s[name] / round_s) for name, wait_s in waits_s.items())
        for share, used_s, prompt_s in links:  # half of a prompt that is on the link, and what came before
            used = used_s / round_s
            waiting_s += share * prompts * used * prompt_s / 2 / max(LEAST_FREE, 1 - used)
        joined_s = ((alone_s + waiting_s) ** ROUND_NORM + most_s**ROUND_NORM) ** (1 / ROUND_NORM)
        round_s = (round_s + joined_s) / 2
    return _Round(max(round_s, alone_s, most_s), alone_s, busy_s)


def _iteration(capacities: Capacities, held: LayerRange, visit: Visit, sequences: float) -> tuple[float, float]:
    """Seconds of an iteration that so many sequences take part in, or as many as fit, and how many those are."""
    mix = capacities.mix
    most = capacities.max_batch_tokens(visit.name, held)
    sequences = min(sequences, most / batch_shape(mix, 1.0, max_batch_tokens=most).tokens)
    cost = capacities.stage_cost(visit.name, held)
    shape = batch_shape(mix, sequences, max_batch_tokens=most)
    first, last = visit.entry == 0, held.end == capacities.model.num_layers
    return cost.time_s(num_layers=held.end - visit.entry, batch=shape, first=first, last=last), sequences


def visits_of(placement: Mapping[str, LayerRange], flows: Sequence[LinkFlow]) -> list[Visit]:
    """Share of requests that enter each node at each layer."""
    total = sum(flow.flow_tokens_per_s for flow in flows if flow.src == COORDINATOR)
    shares: dict[tuple[str, int], float] = {}
    for flow in flows:
        if flow.dst != COORDINATOR:
            entry = 0 if flow.src == COORDINATOR else placement[flow.src].end
            shares[flow.dst, entry] = shares.get((flow.dst, entry), 0.0) + flow.flow_tokens_per_s / total
    return [Visit(name, entry, share) for (name, entry), share in sorted(shares.items())]


def kv_requests(capacities: Capacities, placement: Mapping[str, LayerRange], weighted: WeightedPipelines) -> int:
    """Requests in flight that the KV caches admit when requests take pipelines in proportion to their flows.

    A node that is full closes all pipelines that pass it; the others take the requests, in proportion again, until none
    is open.
    """
    room = {name: admitted_requests(capacities, name, held) for name, held in placement.items()}
    open_ones = [([hop.node for hop in hops], weight) for hops, weight in weighted]
    admitted = 0.0
    while open_ones:
        taking: dict[str, float] = {}  # node -> weight of the open pipelines that pass it
        for nodes, weight in open_ones:
            for name in nodes:
                taking[name] = taking.get(name, 0.0) + weight
        full = min(taking, key=lambda name: room[name] / taking[name])
        amount = room[full] / taking[full]  # requests for each unit of weight
        admitted += amount * sum(weight for _, weight in open_ones)
        for name, weight in taking.items():
            room[name] -= amount * weight
        open_ones = [(nodes, weight) for nodes, weight in open_ones if full not in nodes]
    return max(1, int(admitted + 1e-6))


def round_s(capacities: Capacities, name: str, held: LayerRange, sequences: float) -> float:
    """Seconds that a token spends at a node in a round, with that many decoding sequences together there."""
    return _stage_seconds(capacities, name, held, sequences)[0]


def prompt_s(capacities: Capacities, name: str, held: LayerRange) -> float:
    """Seconds of one prompt alone at a node."""
    return _stage_seconds(capacities, name, held, 1.0)[1]


def _stage_seconds(capacities: Capacities, name: str, held: LayerRange, sequences: float) -> tuple[float, float]:
    """(seconds of an iteration that decodes all sequences, seconds of one prompt alone)."""
    mix, most = capacities.mix, float(capacities.max_batch_tokens(name, held))
    cost = capacities.stage_cost(name, held)
    first, last = held.start == 0, held.end == capacities.model.num_layers
    in_one = min(sequences, most)
    context = mix.decode_context_tokens / max(1e-9, mix.output_tokens - 1) if mix.output_tokens > 1 else 0.0
    decode = BatchShape(decode_tokens=in_one, decode_context_tokens=in_one * context, sampled_tokens=in_one)
    chunks = max(1.0, mix.prompt_tokens / most)
    prefill = BatchShape(
        prefill_tokens=mix.prompt_tokens / chunks,
        prefill_chunks=1.0,
        prefill_pairs=mix.prompt_pairs / chunks,
        sampled_tokens=1.0 / chunks,
    )
    decode_s = cost.time_s(num_layers=held.num_layers, batch=decode, first=first, last=last) * sequences / in_one
    return decode_s, chunks * cost.time_s(num_layers=held.num_layers, batch=prefill, first=first, last=last)
