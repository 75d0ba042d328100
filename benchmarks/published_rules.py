"""The rules of the published system's own simulator (Helix, ASPLOS 2025), written anew, to judge plans by them.

``python -m benchmarks.published_plans`` runs it. What is reproduced is stated in docs/results/2026-11-simulation.md.

Rules, as the published sources have them:

* A node runs one layer at a time on what waits there for that layer: prompts whole (3 at most on an A100, else 1), and
  decodes up to a number of requests and a number of cached tokens. One batch may hold both; its time is the prompt
  table's plus the decode table's, twice that for a single decode. Then the next layer, in turn, where something waits.
* A node's first layer also takes 0.45 ns per byte of activation that came in since its last time.
* Requests travel singly, one at a time on each link, with the share of the network card that the max-flow gives it.
* A request keeps the route that its prompt got, hop by hop by interleaved weighted round robin over the max-flow, links
  under 5 % of a node's flow and nodes whose KV cache is 85 % promised left out. Where no hop is left it is dropped.
* 20 requests at the start, 0.1 s apart. Whenever a prompt or a request ends, one more follows after 0.1 s if the
  fullest layer's caches are promised up to 80 % at most; a request is promised its prompt and 240 tokens.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx as nx

from benchmarks.published_node import DEVICES, Link, Node, Request, Table, interpolated, read_table
from helixbench.profiler.cluster import ClusterProfile

PROMISED_OUTPUT_TOKENS = 240
FEED_BELOW, HOP_BELOW = 0.8, 0.85
FEED_AFTER_S = 0.1
FIRST_REQUESTS = 20
SMALLEST_SHARE = 0.05
Placement = Mapping[str, tuple[int, int]]


@dataclass
class Served:
    """What came out in the window."""

    total_tokens_per_s: float
    decode_tokens_per_s: float
    decode_s: float
    in_flight: int
    dropped: int
    in_flight_mean: float
    busy: dict[str, float]


class Simulation:
    """One run."""

    def __init__(
        self,
        profile: ClusterProfile,
        tables: Path,
        lengths: Sequence[tuple[int, int]],
        placement: Placement,
        *,
        partial: bool = True,
        seed: int = 0,
    ) -> None:
        self.lengths = lengths
        self.draw = random.Random(seed)
        self.num_layers = profile.model.num_layers
        self.nodes = _nodes(profile, tables, placement)
        self.sources = _connect(profile, self.nodes, partial=partial)
        self.events: list[tuple[float, int, str, object]] = []
        self.number = 0
        self.flying: set[Request] = set()
        self.dropped = 0
        self.kv_layers = [0.0] * self.num_layers
        for node in self.nodes:
            for layer in range(node.start, node.end):
                self.kv_layers[layer] += node.kv_total / (node.end - node.start)

    def run(self, *, warmup_s: float, window_s: float) -> Served:
        """Serve for so long; what came out after the warm-up."""
        self.begin_s, self.stop_s = warmup_s, warmup_s + window_s
        self.decoded = self.prompted = 0
        self.waited_s = self.area = self.seen_s = 0.0
        for i in range(FIRST_REQUESTS):
            self._at(i * FEED_AFTER_S, "issue", self._drawn())
        while self.events and self.events[0][0] < self.stop_s:
            now, _, kind, what = heapq.heappop(self.events)
            if kind == "end":
                self._end_batch(what, now)  # type: ignore[arg-type]
            elif kind == "wake":
                self._wake(what, now)  # type: ignore[arg-type]
            elif kind == "issue":
                self._issue(what, now)  # type: ignore[arg-type]
            else:
                self._gather(what, now)  # type: ignore[arg-type]
        self._count_flying(self.stop_s)
        return Served(
            total_tokens_per_s=(self.decoded + self.prompted) / window_s,
            decode_tokens_per_s=self.decoded / window_s,
            decode_s=self.waited_s / max(1, self.decoded),
            in_flight=len(self.flying),
            dropped=self.dropped,
            in_flight_mean=self.area / window_s,
            busy={node.name: node.busy_s / self.stop_s for node in self.nodes},
        )

    def _drawn(self) -> Request:
        return Request(*self.lengths[self.draw.randint(0, len(self.lengths) - 1)])

    def _at(self, when: float, kind: str, what: object) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, kind, what))

    def _wake(self, node: Node, now: float) -> None:
        if node.wake_s <= now:
            node.wake_s = float("inf")
        if node.batch is None:
            self._start(node, now)

    def _start(self, node: Node, now: float) -> None:
        node.receive(now)
        seconds = node.start_batch()
        if seconds > 0:
            self._at(now + seconds, "end", node)
            return
        first = min((link.on_way[0][0] for link in node.ins if link.on_way), default=float("inf"))
        self._wake_at(node, first)

    def _wake_at(self, node: Node, when: float) -> None:
        if when < node.wake_s:
            node.wake_s = when
            self._at(when, "wake", node)

    def _end_batch(self, node: Node, now: float) -> None:
        assert node.batch is not None
        prompts, decodes = node.batch
        node.batch = None
        if node.layer == len(node.prompts) - 1:
            for request in (*prompts, *decodes):
                self._send_on(request, now)
        else:
            node.receive(now)
            node.prompts[node.layer + 1] += prompts
            node.decodes[node.layer + 1] += decodes
        node.receive(now)
        node.advance()
        self._start(node, now)

    def _send_on(self, request: Request, now: float) -> None:
        request.place += 1
        link = request.links[request.place]
        arrival = link.arrival_s(request, now)
        if link.dst is None:
            self._at(arrival, "gather", request)
            return
        link.on_way.append((arrival, request))
        if link.dst.batch is None:
            self._wake_at(link.dst, arrival)

    def _gather(self, request: Request, now: float) -> None:
        """A prompt or a token is done."""
        is_prompt = request.context == 0
        if now >= self.begin_s:
            if is_prompt:
                self.prompted += request.tokens
            else:
                self.decoded += 1
                self.waited_s += now - request.issued_s
        request.context += request.tokens
        request.output_left -= not is_prompt
        if request.output_left:
            request.tokens = 1
            for link in request.links:
                link.load += 1 / link.flow
            self._send(request, now)
        else:
            self._count_flying(now)
            self.flying.discard(request)
            self._promise(request, -1)
        if (is_prompt or not request.output_left) and self._fullest() <= FEED_BELOW:
            self._at(now + FEED_AFTER_S, "issue", self._drawn())

    def _issue(self, request: Request, now: float) -> None:
        if not self._route(request):
            self.dropped += 1
            return
        self._count_flying(now)
        self.flying.add(request)
        self._promise(request, 1)
        self._send(request, now)

    def _send(self, request: Request, now: float) -> None:
        request.issued_s, request.place = now, -1
        self._send_on(request, now)

    def _count_flying(self, now: float) -> None:
        since = max(self.seen_s, self.begin_s)
        if now > since:
            self.area += (now - since) * len(self.flying)
        self.seen_s = now

    def _route(self, request: Request) -> bool:
        """Choose hops; whether there are any all the way."""
        outs, layer = self.sources, 0
        request.hops, request.links = [], []
        promised = request.prompt + PROMISED_OUTPUT_TOKENS
        while True:
            total = sum(link.flow for link in outs)
            open_links = [
                link
                for link in outs
                if link.flow > 0
                and link.flow >= SMALLEST_SHARE * total
                and (link.dst is None or _has_room(link.dst, promised))
            ]
            if not open_links:
                for link in request.links:
                    link.load -= request.prompt / link.flow
                return False
            chosen = min(open_links, key=lambda link: link.load + request.prompt / link.flow)
            chosen.load += request.prompt / chosen.flow
            request.links.append(chosen)
            if chosen.dst is None:
                return True
            request.hops.append((chosen.dst, layer))
            outs, layer = chosen.dst.outs, chosen.dst.end

    def _promise(self, request: Request, sign: int) -> None:
        for node, first in request.hops:
            node.kv_left -= sign * (request.prompt + PROMISED_OUTPUT_TOKENS) * (node.end - first)

    def _fullest(self) -> float:
        left = [0.0] * self.num_layers
        for node in self.nodes:
            for layer in range(node.start, node.end):
                left[layer] += node.kv_left / (node.end - node.start)
        return max(1 - free / total for free, total in zip(left, self.kv_layers, strict=True))


def _has_room(node: Node, promised: int) -> bool:
    return node.kv_left - promised * (node.end - node.start) >= (1 - HOP_BELOW) * node.kv_total


def _nodes(profile: ClusterProfile, tables: Path, placement: Placement) -> list[Node]:
    times: dict[str, tuple[list[float], Table]] = {}
    found = []
    for node in profile.nodes:
        kind = node.device.name
        if node.name not in placement:
            continue
        if kind not in times:
            prompt, decode = (
                read_table(tables / f"llama2-70b_{kind.lower()}_{what}.csv") for what in ("prompt", "decode")
            )
            times[kind] = ([interpolated(decode, n) for n in range(int(decode[-1][0]) + 1)], prompt)
        found.append(Node(node.name, DEVICES[kind], *placement[node.name], times[kind]))
    return found


def _connect(profile: ClusterProfile, nodes: Sequence[Node], *, partial: bool) -> list[Link]:
    """The links that the max-flow uses; those out of the coordinator are returned."""
    model, default = profile.model, profile.default_link
    assert default is not None, "all links alike"
    assert not profile.links, "all links alike"
    act = model.activation_bytes_per_token + model.token_bytes
    nic = {node.name: (node.nic_in_bytes_per_s or 1e10, node.nic_out_bytes_per_s or 1e10) for node in profile.nodes}
    graph = nx.DiGraph()
    graph.add_edge("source", "out", capacity=1e10 / model.token_bytes)
    graph.add_edge("in", "sink", capacity=1e10 / model.token_bytes)
    rate = {node.name: node.capacity_tokens_per_s or () for node in profile.nodes}
    pairs: list[tuple[Node | None, Node | None, float]] = []
    pairs += [(None, node, float(model.token_bytes)) for node in nodes if node.start == 0]
    pairs += [(node, None, float(model.token_bytes)) for node in nodes if node.end == model.num_layers]
    pairs += [
        (a, b, act)
        for a in nodes
        for b in nodes
        if a is not b and (a.end == b.start or (partial and b.start < a.end < b.end))
    ]
    for node in nodes:
        graph.add_edge(f"{node.name} in", f"{node.name} start", capacity=nic[node.name][0] / act)
        graph.add_edge(f"{node.name} start", f"{node.name} end", capacity=rate[node.name][node.end - node.start - 1])
        graph.add_edge(f"{node.name} end", f"{node.name} out", capacity=nic[node.name][1] / act)
    for a, b, size in pairs:
        src, dst = f"{a.name} out" if a else "out", f"{b.name} in" if b else "in"
        graph.add_edge(src, dst, capacity=default.bandwidth_bytes_per_s / size)
    _, flows = nx.maximum_flow(graph, "source", "sink")
    sources: list[Link] = []
    ends: list[tuple[Node | None, Node | None, Link]] = []
    for a, b, size in pairs:
        flow = flows[f"{a.name} out" if a else "out"][f"{b.name} in" if b else "in"]
        link = Link(b, size, flow, default.latency_s)
        ends.append((a, b, link))
        (a.outs if a else sources).append(link)
        if b and flow > 0:
            b.ins.append(link)
    for a, b, link in ends:
        if link.flow > 0:
            used = link.flow * link.bytes_per_token
            out_all = sum(other.flow * other.bytes_per_token for other in (a.outs if a else sources))
            in_all = sum(other.flow * other.bytes_per_token for _, dst, other in ends if dst is b)
            link.rate = min(default.bandwidth_bytes_per_s, 1e10 * used / out_all, 1e10 * used / in_all)
    return sources
