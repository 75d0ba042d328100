"""Upper bound on expected throughput with a given number of requests in flight, and lower bounds on latency.

Every token goes once through all layers, at best alone. So there is a least round trip over all placements, and a least
time for a whole request; with ``N`` in flight at most ``N`` requests are served in it (Little's law).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from helixbench.profiler.cluster import COORDINATOR
from helixbench.profiler.cost.model import BatchShape
from helixbench.solver.bounds.work import Workers
from helixbench.solver.problem.arrays import FloatArray
from helixbench.solver.problem.capacity import Capacities, admitted_requests
from helixbench.solver.problem.plan import ExpectedBound, LayerRange


def bound_of_expected(capacities: Capacities, flow_bound: float) -> ExpectedBound:
    """The bound for the capacities' requests in flight, or for as many as the KV caches can hold at most.

    Args:
        capacities: of the nodes, for the workload and the requests in flight.
        flow_bound: tokens/s that no placement's max-flow exceeds.
    """
    held = most_in_flight(capacities)
    in_flight = held if capacities.concurrency is None else min(held, capacities.concurrency)
    round_s, first_s = least_round_s(capacities), least_ttft_s(capacities)
    mix = capacities.mix
    request_s = (mix.output_tokens - 1) * round_s + min(round_s, first_s)
    by_rounds = in_flight * (mix.prompt_tokens + mix.output_tokens) / request_s if request_s > 0 else flow_bound
    return ExpectedBound(
        in_flight=in_flight, tokens_per_s=min(flow_bound, by_rounds), least_tpot_s=round_s, least_ttft_s=first_s
    )


def least_round_s(capacities: Capacities) -> float:
    """Least seconds of one output token's way through all layers, over all placements; infinite where there is none.

    Each node is used once, alone with this token; ranges need not join up, links are the fastest that there are.
    """
    context = float(min(prompt for prompt, _ in capacities.workload.lengths))
    alone = BatchShape(decode_tokens=1.0, decode_context_tokens=context, sampled_tokens=1.0)
    return _least_way_s(capacities, lambda name, run: _alone_s(capacities, name, run, alone))


def least_ttft_s(capacities: Capacities) -> float:
    """Least seconds to a first output token: the last token of its prompt goes through all layers, as in a round."""
    alone = BatchShape(prefill_tokens=1.0, prefill_chunks=1.0, prefill_pairs=1.0, sampled_tokens=1.0)
    return _least_way_s(capacities, lambda name, run: _alone_s(capacities, name, run, alone))


def most_in_flight(capacities: Capacities) -> int:
    """Most requests whose KV cache any placement admits: the largest ``N`` with ``N * L <=`` their layers x room."""
    num_layers = capacities.model.num_layers
    rooms: dict[int, tuple[int, list[tuple[int, float]]]] = {}  # kind -> nodes, (layers held, requests admitted)
    for name in capacities.nodes:
        kind = capacities.kind(name)
        count, room = rooms.get(kind, (0, []))
        if not room:
            room = [
                (k, _most(capacities, name, k, admitted_requests)) for k in range(1, capacities.max_layers(name) + 1)
            ]
        rooms[kind] = (count + 1, room)
    low, high = 1.0, sum(count * max((a for _, a in room), default=0.0) for count, room in rooms.values()) + 1.0
    for _ in range(100):
        middle = (low + high) / 2
        held = sum(count * max((k * min(a, middle) for k, a in room), default=0.0) for count, room in rooms.values())
        low, high = (middle, high) if held >= middle * num_layers * (1 - 1e-12) else (low, middle)
    return max(1, int(high))


def least_nodes(capacities: Capacities, wanted: float) -> int:
    """Nodes that any plan of ``wanted`` tokens/s has at least: so many do the work of it when each does its most."""
    work: dict[int, float] = {}
    for name in capacities.nodes:
        kind = capacities.kind(name)
        if kind not in work:
            work[kind] = Workers(capacities, names=[name]).work(wanted)
    left = wanted * capacities.model.num_layers * (1 - 1e-9)
    for number, most in enumerate(sorted((work[capacities.kind(n)] for n in capacities.nodes), reverse=True), start=1):
        left -= most
        if left <= 0:
            return number
    return len(capacities.nodes) + 1


def _least_way_s(capacities: Capacities, run_s: Callable[[str, int], float]) -> float:
    """Least seconds through all layers with each node used at most once, by dynamic programming over the nodes."""
    num_layers = capacities.model.num_layers
    hop_s, ends_s = _least_hops_s(capacities)
    reached: FloatArray = np.full(num_layers + 1, np.inf)  # layers run -> least seconds
    reached[0] = 0.0
    times: dict[int, list[float]] = {}
    used: dict[int, int] = {}
    for name in capacities.nodes:
        kind = capacities.kind(name)
        used[kind] = used.get(kind, 0) + 1
        if used[kind] > num_layers:
            continue
        if kind not in times:
            times[kind] = [run_s(name, run) for run in range(1, capacities.max_layers(name) + 1)]
        after = reached.copy()
        for run, seconds in enumerate(times[kind], start=1):
            np.minimum(after[run:], reached[:-run] + (seconds + hop_s), out=after[run:])
        reached = after
    return max(0.0, float(reached[num_layers]) - hop_s) + ends_s


def _alone_s(capacities: Capacities, name: str, run: int, alone: BatchShape) -> float:
    """Least seconds of a token alone at a node that runs this many layers, wherever they lie."""
    cost = capacities.nodes[name].cost
    if cost is not None:
        return cost.stage.time_s(num_layers=run, batch=alone, first=False, last=False)
    # With a table an iteration takes as long wherever the token enters the range that is held.
    held = (capacities.middle(k) for k in range(run, capacities.max_layers(name) + 1))
    costs = (capacities.stage_cost(name, of) for of in held)
    return min(cost.time_s(num_layers=run, batch=alone, first=False, last=False) for cost in costs)


def _most(
    capacities: Capacities, name: str, layers: int, value: Callable[[Capacities, str, LayerRange], float]
) -> float:
    """The largest value of a range of that length over where it lies; 0 where it fits nowhere."""
    return max((value(capacities, name, held) for held in capacities.places(name, layers)), default=0.0)


def _least_hops_s(capacities: Capacities) -> tuple[float, float]:
    """Least seconds of one token on a link between nodes, and on those out of the coordinator and back into it."""
    profile = capacities.profile
    between: list[float] = []
    out: list[float] = []
    back: list[float] = []
    for link in profile.links:
        seconds = link.latency_s + profile.bytes_per_token(link.src, link.dst) / link.bandwidth_bytes_per_s
        (out if link.src == COORDINATOR else back if link.dst == COORDINATOR else between).append(seconds)
    default, model = profile.default_link, profile.model
    if default is not None:
        between.append(default.latency_s + model.activation_bytes_per_token / default.bandwidth_bytes_per_s)
        out.append(default.latency_s + model.token_bytes / default.bandwidth_bytes_per_s)
        back.append(out[-1])
    return min(between, default=0.0), min(out, default=0.0) + min(back, default=0.0)
