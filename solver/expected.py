"""What a plan will deliver: the fixed point of batch sizes, stage times and Little's law.

A request in flight is always at one hop of its pipeline or on a link. So with ``N`` requests in flight and ``X`` output
tokens/s, ``N = X * (time of one token along its path)``, and the batches that decide those times are what arrives while
an iteration runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from profiler.cluster_profile import COORDINATOR, ClusterProfile, MeasuredCost

from .capacity import Capacities, RequestMix, batch_shape
from .network import LinkTable
from .plan import Expected, LayerRange, LinkFlow
from .workload import Workload

TABLE_KV_SHARE = 0.8
"""Of the KV cache of a node with a capacity table, what admission fills; a measured node's server fills all of it."""


@dataclass(frozen=True)
class Visit:
    """Requests entering one node at one layer: ``share`` of all requests."""

    name: str
    entry: int
    share: float


def predict(
    profile: ClusterProfile,
    placement: Mapping[str, LayerRange],
    flows: Sequence[LinkFlow],
    workload: Workload,
    concurrency: int | None,
    *,
    partial: bool,
) -> Expected:
    """Expected throughput and latency.

    Args:
        profile: the cluster.
        placement: node -> layer range.
        flows: what routing follows; the shares of requests are taken from them, not the totals.
        workload: lengths of requests.
        concurrency: requests in flight; ``None`` for as many as the KV caches hold.
        partial: whether requests may enter ranges late; the flows say where they do.
    """
    del partial
    capacities = Capacities(profile, workload)
    visits = visits_of(placement, flows)
    held = kv_requests(capacities, placement, visits)
    in_flight = float(held if concurrency is None else min(concurrency, held))
    links_s = _link_seconds(profile, flows)
    sequences_per_s = _fixed_point(capacities, placement, visits, in_flight, links_s)
    mix = capacities.mix
    busy, batch = {}, {}
    for name in placement:
        mine = [visit for visit in visits if visit.name == name]
        if mine:
            seconds, batch[name] = _node(capacities, placement, mine, sequences_per_s)
            busy[name] = min(1.0, sequences_per_s * sum(visit.share for visit in mine) * seconds / batch[name])
    tpot_s = in_flight / sequences_per_s
    return Expected(
        concurrency=int(in_flight) if concurrency is None else concurrency,
        total_tokens_per_s=sequences_per_s * mix.tokens_per_output,
        output_tokens_per_s=sequences_per_s,
        tpot_s=tpot_s,
        ttft_s=tpot_s,
        in_flight=in_flight,
        node_busy=busy,
        node_batch_tokens=batch,
    )


def visits_of(placement: Mapping[str, LayerRange], flows: Sequence[LinkFlow]) -> list[Visit]:
    """Which share of requests enters which node at which layer."""
    total = sum(flow.flow_tokens_per_s for flow in flows if flow.src == COORDINATOR)
    shares: dict[tuple[str, int], float] = {}
    for flow in flows:
        if flow.dst != COORDINATOR:
            entry = 0 if flow.src == COORDINATOR else placement[flow.src].end
            shares[flow.dst, entry] = shares.get((flow.dst, entry), 0.0) + flow.flow_tokens_per_s / total
    return [Visit(name, entry, share) for (name, entry), share in sorted(shares.items())]


def kv_requests(capacities: Capacities, placement: Mapping[str, LayerRange], visits: Sequence[Visit]) -> int:
    """Requests in flight that the KV caches admit: the first node to be full ends admission."""
    most = math.inf
    for name, held in placement.items():
        share = sum(visit.share for visit in visits if visit.name == name)
        if share > 0:
            filled = 1.0 if capacities.is_time_shared(name) else TABLE_KV_SHARE
            most = min(most, filled * capacities.kv_tokens(name, held) / (share * capacities.mix.held_kv_tokens))
    return max(1, int(most)) if math.isfinite(most) else 1


def _link_seconds(profile: ClusterProfile, flows: Sequence[LinkFlow]) -> float:
    """Seconds that one token spends on links along its path, in the mean: latency and its own bytes."""
    table = LinkTable(profile)
    total = sum(flow.flow_tokens_per_s for flow in flows if flow.src == COORDINATOR)
    return sum(
        flow.flow_tokens_per_s / total * ((table.latency_s(flow.src, flow.dst) or 0.0) + 1 / flow.capacity_tokens_per_s)
        for flow in flows
    )


def _fixed_point(
    capacities: Capacities,
    placement: Mapping[str, LayerRange],
    visits: Sequence[Visit],
    in_flight: float,
    links_s: float,
) -> float:
    """Output tokens/s at which as many requests are in flight as there are; more flow, more in flight, so bisection."""
    by_node = {name: [visit for visit in visits if visit.name == name] for name in placement}
    low, high = 0.0, in_flight / max(links_s, 1e-9)
    for _ in range(60):
        rate = (low + high) / 2
        there = rate * links_s
        for mine in by_node.values():
            if mine:
                seconds, sequences = _node(capacities, placement, mine, rate)
                arriving = rate * sum(visit.share for visit in mine)
                there += arriving * seconds * (1 + min(1.0, arriving * seconds / sequences) / 2)
        if there > in_flight:
            high = rate
        else:
            low = rate
    return low


def _node(
    capacities: Capacities, placement: Mapping[str, LayerRange], mine: Sequence[Visit], rate: float
) -> tuple[float, float]:
    """(seconds of an iteration, sequences in it) of a node that ``rate`` x share sequences reach each second.

    The batch is what arrives while an iteration runs, at least one. Infinite seconds where the node cannot keep up.
    """
    arriving = rate * sum(visit.share for visit in mine)
    cost = capacities.nodes[mine[0].name].cost
    per_sequence = batch_shape(capacities.mix, 1.0, max_batch_tokens=1.0).tokens
    most = math.inf if cost is None else cost.max_batch_tokens / per_sequence
    sequences = 1.0
    for _ in range(1000):
        seconds = _seconds(capacities, placement, mine, sequences)
        wanted = max(1.0, arriving * seconds)
        if wanted <= sequences * (1 + 1e-9):
            return seconds, sequences
        if wanted > most:
            break
        sequences = wanted
    return math.inf, most


def _seconds(
    capacities: Capacities, placement: Mapping[str, LayerRange], mine: Sequence[Visit], sequences: float
) -> float:
    """Seconds of an iteration of ``sequences`` sequences, spread over the node's entries as its requests are."""
    name = mine[0].name
    held = placement[name]
    cost = capacities.nodes[name].cost
    if cost is None:
        return sequences * capacities.mix.tokens_per_output / capacities.tokens_per_s(name, held)
    total = sum(visit.share for visit in mine)
    return sum(
        visit.share / total * _measured_seconds(capacities, cost, held, visit.entry, sequences, capacities.mix)
        for visit in mine
    )


def _measured_seconds(
    capacities: Capacities, cost: MeasuredCost, held: LayerRange, entry: int, sequences: float, mix: RequestMix
) -> float:
    shape = batch_shape(mix, sequences, max_batch_tokens=cost.max_batch_tokens)
    return cost.stage.time_s(
        num_layers=held.end - entry,
        batch=shape,
        first=entry == 0,
        last=held.end == capacities.model.num_layers,
    )
