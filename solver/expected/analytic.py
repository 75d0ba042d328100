"""What a placement is expected to deliver, analytically: fast enough to be asked thousands of times in a search.

A round is the way of one output token through all stages and back. A request in flight is always somewhere on it, so
with ``N`` in flight ``N / round_s`` output tokens/s come out (Little's law). Sequences that meet at a node are batched,
leave together and stay together: nothing in a chain of batching servers parts them but the prompts between them. A
prompt takes longer through a stage than a token, and whoever catches up with one stays behind it to the end: the round
takes as long as a group does that is free up to there, and as the prompt does from there on. The simulation
(``simulated``) has the groups themselves; this stands in for it in the search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from helixbench.profiler.cluster import COORDINATOR
from helixbench.profiler.cost.measured import MeasuredCost
from helixbench.profiler.cost.model import BatchShape
from helixbench.solver.problem.capacity import Capacities, RequestMix, admitted_requests
from helixbench.solver.problem.links import LinkTable
from helixbench.solver.problem.plan import Expected, LayerRange, LinkFlow
from helixbench.solver.simulation.stage_time import table_round_s

GROUPINGS = 3
"""How often the number of groups and the time of a round are computed, each from the other."""


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
    """Expected throughput and latency.

    Args:
        capacities: of the cluster for the workload.
        placement: node -> layer range.
        flows: weights of the pipelines; shares of requests are taken from them, not totals.
        concurrency: requests in flight; ``None`` for as many as the KV caches hold.
    """
    visits = visits_of(placement, flows)
    admitted = kv_requests(capacities, placement, visits)
    in_flight = admitted if concurrency is None else min(concurrency, admitted)
    links_s = _link_seconds(capacities.links, flows, in_flight)
    passing: dict[str, float] = {}  # node -> share of requests that pass it, whatever their entry layer
    for visit in visits:
        passing[visit.name] = passing.get(visit.name, 0.0) + visit.share
    round_s, groups = 0.0, 1.0
    for _ in range(GROUPINGS):
        hops = [
            _hop(capacities, placement[visit.name], visit, max(1.0, in_flight / groups * passing[visit.name]))
            for visit in visits
        ]
        obstacles = _obstacles(hops)
        round_s = _round_seconds(capacities.mix, hops, links_s, in_flight, obstacles)
        groups = max(1.0, in_flight / round_s / capacities.mix.output_tokens * obstacles.number * obstacles.slower_s)
    carried = sum(flow.flow_tokens_per_s for flow in flows if flow.src == COORDINATOR)
    mix = capacities.mix
    round_s = max(round_s, in_flight * mix.tokens_per_output / carried)
    tokens_per_s = in_flight / round_s
    busy: dict[str, float] = {}
    for hop in hops:
        spent = hop.share * (hop.decode_s / hop.sequences + hop.prefill_s / mix.output_tokens)
        busy[hop.name] = min(1.0, busy.get(hop.name, 0.0) + tokens_per_s * spent)
    return Expected(
        concurrency=in_flight if concurrency is None else concurrency,
        total_tokens_per_s=tokens_per_s * mix.tokens_per_output,
        output_tokens_per_s=tokens_per_s,
        ttft_s=links_s + sum(hop.share * (hop.prefill_s + hop.decode_s / 2) for hop in hops),
        tpot_s=round_s,
        in_flight=float(in_flight),
        node_busy=busy,
    )


def visits_of(placement: Mapping[str, LayerRange], flows: Sequence[LinkFlow]) -> list[Visit]:
    """Share of requests that enter each node at each layer."""
    total = sum(flow.flow_tokens_per_s for flow in flows if flow.src == COORDINATOR)
    shares: dict[tuple[str, int], float] = {}
    for flow in flows:
        if flow.dst != COORDINATOR:
            entry = 0 if flow.src == COORDINATOR else placement[flow.src].end
            shares[flow.dst, entry] = shares.get((flow.dst, entry), 0.0) + flow.flow_tokens_per_s / total
    return [Visit(name, entry, share) for (name, entry), share in sorted(shares.items())]


def kv_requests(capacities: Capacities, placement: Mapping[str, LayerRange], visits: Sequence[Visit]) -> int:
    """Requests in flight that the KV caches admit: those of the layer whose nodes together hold fewest.

    Nodes that hold a layer side by side fill up together, for routing passes over one that is full.
    """
    per_layer = [0.0] * capacities.model.num_layers
    entries: dict[str, int] = {}
    for visit in visits:
        entries[visit.name] = min(visit.entry, entries.get(visit.name, visit.entry))
    for name, entry in entries.items():
        requests = admitted_requests(capacities, name, placement[name])
        for layer in range(entry, placement[name].end):
            per_layer[layer] += requests
    return max(1, int(min(per_layer)))


def round_s(capacities: Capacities, name: str, held: LayerRange, sequences: float) -> float:
    """Seconds that a token spends at a node in a round, with that many sequences together there."""
    cost = capacities.nodes[name].cost
    if cost is None:
        return table_round_s(capacities, name, held)
    return _stage_seconds(capacities, cost, held, held.start, sequences)[0]


def prompt_s(capacities: Capacities, name: str, held: LayerRange) -> float:
    """Seconds of one prompt alone at a node; 0 for a capacity table, whose time for a token includes prompts."""
    cost = capacities.nodes[name].cost
    return 0.0 if cost is None else _stage_seconds(capacities, cost, held, held.start, 1.0)[1]


def _link_seconds(links: LinkTable, flows: Sequence[LinkFlow], in_flight: int) -> float:
    """Seconds that a group spends on links in a round: latency, and the bytes of all that share the link."""
    total = sum(flow.flow_tokens_per_s for flow in flows if flow.src == COORDINATOR)
    seconds = 0.0
    for flow in flows:
        share = flow.flow_tokens_per_s / total
        together = max(1.0, in_flight * share)
        seconds += share * ((links.latency_s(flow.src, flow.dst) or 0.0) + together / flow.capacity_tokens_per_s)
    return seconds


@dataclass(frozen=True)
class _Hop:
    """A visit: sequences that pass together, seconds of their iteration, and seconds and chunks of a prompt."""

    name: str
    share: float
    sequences: float
    decode_s: float
    prefill_s: float
    chunks: float = 1.0


def _hop(capacities: Capacities, held: LayerRange, visit: Visit, sequences: float) -> _Hop:
    cost = capacities.nodes[visit.name].cost
    if cost is None:
        seconds = table_round_s(capacities, visit.name, held)
        return _Hop(visit.name, visit.share, sequences, seconds, 0.0)
    decode_s, prefill_s = _stage_seconds(capacities, cost, held, visit.entry, sequences)
    chunks = max(1.0, capacities.mix.prompt_tokens / cost.max_batch_tokens)
    return _Hop(visit.name, visit.share, sequences, decode_s, prefill_s, chunks)


def _stage_seconds(
    capacities: Capacities, cost: MeasuredCost, held: LayerRange, entry: int, sequences: float
) -> tuple[float, float]:
    """(seconds of an iteration that decodes all sequences, seconds of one prompt alone)."""
    mix, most = capacities.mix, float(cost.max_batch_tokens)
    first, last = entry == 0, held.end == capacities.model.num_layers
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
    run = held.end - entry
    decode_s = cost.stage.time_s(num_layers=run, batch=decode, first=first, last=last) * sequences / in_one
    return decode_s, chunks * cost.stage.time_s(num_layers=run, batch=prefill, first=first, last=last)


@dataclass(frozen=True)
class _Obstacles:
    """Chunks of prompts on the way: how many a prompt has, and by how many seconds over all hops one is slower."""

    number: float
    slower_s: float


def _obstacles(hops: Sequence[_Hop]) -> _Obstacles:
    """0 s for capacity tables, whose seconds include the prompts."""
    number = sum(hop.share * hop.chunks for hop in hops) / sum(hop.share for hop in hops)
    return _Obstacles(number, sum(hop.share * hop.prefill_s / hop.chunks for hop in hops))


def _round_seconds(
    mix: RequestMix, hops: Sequence[_Hop], links_s: float, in_flight: int, obstacles: _Obstacles
) -> float:
    """Seconds of a round: every hop's iteration, and the delay by the chunk of a prompt that the group catches up with.

    Chunks start at random times, ``c`` a second, and are ``d`` seconds slower than the group over all hops. One that is
    ``u < d`` ahead at the start is caught up with and costs ``d - u``: on average ``d - (1 - exp(-c d)) / c``. A round
    is no shorter than what any node needs for all that passes it in one, prompts included.
    """
    bare_s = links_s + sum(hop.share * hop.decode_s for hop in hops)
    needed: dict[str, float] = {}
    for hop in hops:
        prompts = in_flight * hop.share / mix.output_tokens
        whole = in_flight * hop.share / hop.sequences
        needed[hop.name] = needed.get(hop.name, 0.0) + whole * hop.decode_s + prompts * hop.prefill_s
    least_s = max(needed.values(), default=0.0)
    slower_s = obstacles.slower_s
    if slower_s <= 0:
        return max(bare_s, least_s)
    round_s = max(bare_s, least_s)
    for _ in range(8):
        chunks_per_s = obstacles.number * in_flight / round_s / mix.output_tokens
        behind_s = slower_s + math.expm1(-chunks_per_s * slower_s) / chunks_per_s
        round_s = (round_s + max(bare_s + behind_s, least_s)) / 2
    return max(round_s, least_s)
