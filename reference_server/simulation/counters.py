"""What nodes and links did until a moment, and the run record made of two such moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from helixbench.reference_server.run_log import LinkUse, NodePoint, NodeUse
from helixbench.reference_server.simulation.node import SimulatedNode
from helixbench.solver.scheduling.history import HistoryKeeper


class LinkCount(msgspec.Struct):
    """A link in use, and what crossed it so far; ``deliver`` takes what arrives."""

    bytes_per_token: float
    deliver: Callable[[Any], None]
    messages: int = 0
    tokens: int = 0


class Snapshot(msgspec.Struct, frozen=True):
    """Counters of all nodes and links, and of the tokens that came out, at a moment."""

    nodes: dict[str, NodeUse]
    links: dict[tuple[str, str], tuple[int, int]]  # (from, to) -> (messages, tokens)
    prompt_tokens: int
    output_tokens: int


def snapshot(
    nodes: Iterable[SimulatedNode],
    links: Mapping[tuple[str, str], LinkCount],
    *,
    prompt_tokens: int,
    output_tokens: int,
) -> Snapshot:
    """Read all counters; the peaks of KV use begin anew, as when an agent is asked."""
    uses = {}
    for node in nodes:
        uses[node.name] = NodeUse(
            busy_s=node.busy_s,
            iterations=node.iterations,
            prefill_tokens=node.prefill_tokens,
            decode_tokens=node.decode_tokens,
            kv_peak_tokens=node.kv_peak_tokens,
            kv_capacity_tokens=node.kv_capacity_tokens,
        )
        node.kv_peak_tokens = node.kv_used_tokens
    counts = {ends: (count.messages, count.tokens) for ends, count in links.items()}
    return Snapshot(uses, counts, prompt_tokens, output_tokens)


def node_uses(begin: Snapshot, end: Snapshot) -> dict[str, NodeUse]:
    """What each node did between the two."""
    uses = {}
    for name, after in end.nodes.items():
        before = begin.nodes[name]
        uses[name] = NodeUse(
            busy_s=after.busy_s - before.busy_s,
            iterations=after.iterations - before.iterations,
            prefill_tokens=after.prefill_tokens - before.prefill_tokens,
            decode_tokens=after.decode_tokens - before.decode_tokens,
            kv_peak_tokens=after.kv_peak_tokens,
            kv_capacity_tokens=after.kv_capacity_tokens,
        )
    return uses


def link_uses(begin: Snapshot, end: Snapshot, links: Mapping[tuple[str, str], LinkCount]) -> tuple[LinkUse, ...]:
    """What crossed each link between the two, in the order of their names."""
    uses = []
    for (src, dst), (messages, tokens) in sorted(end.links.items()):
        messages_before, tokens_before = begin.links.get((src, dst), (0, 0))
        crossed = tokens - tokens_before
        uses.append(
            LinkUse(
                src=src,
                dst=dst,
                payload_bytes=round(crossed * links[src, dst].bytes_per_token),
                messages=messages - messages_before,
                tokens=crossed,
            )
        )
    return tuple(uses)


def node_points(history: HistoryKeeper, *, now_s: float) -> tuple[NodePoint, ...]:
    """A node's series over the run."""
    read = history.read(now_s)
    points = []
    for index, interval in enumerate(read.intervals):
        start_s = now_s - read.age_s + index * read.width_s
        end_s = min(start_s + read.width_s, now_s)
        if end_s > start_s:
            batch = interval.decode_tokens / interval.iterations if interval.iterations else None
            points.append(NodePoint(end_s, batch, interval.kv_tokens, min(1.0, interval.busy_s / (end_s - start_s))))
    return tuple(points)
