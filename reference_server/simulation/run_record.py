"""The run record of a simulation: counters of nodes and links at the two ends of the window, and their difference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from helixbench.reference_server.run_log import LinkUse, NodePoint, NodeUse, node_points
from helixbench.solver.problem.plan import Pipeline
from helixbench.solver.scheduling.history import HistoryKeeper
from helixbench.solver.scheduling.requests import InFlight
from helixbench.solver.simulation.cluster import SimulatedCluster
from helixbench.solver.simulation.node import SimulatedNode


class KvUse:
    """KV slots that requests own on each node, their peak, and each node's history.

    Args:
        capacities: node -> KV slots.
        pipelines: those that the router has chosen so far, by index.
    """

    def __init__(self, capacities: Mapping[str, int], pipelines: Sequence[Pipeline]) -> None:
        self._capacities, self._pipelines = capacities, pipelines
        self._used = dict.fromkeys(capacities, 0)
        self._peak = dict.fromkeys(capacities, 0)
        self._histories = {name: HistoryKeeper() for name in capacities}

    def open(self, requests: Iterable[InFlight]) -> None:
        """These requests were admitted."""
        for state in requests:
            for hop in self._pipelines[state.pipeline]:
                self._used[hop.node] += state.request.kv_tokens
                self._peak[hop.node] = max(self._peak[hop.node], self._used[hop.node])

    def close(self, requests: Iterable[InFlight]) -> None:
        """These requests have ended."""
        for state in requests:
            for hop in self._pipelines[state.pipeline]:
                self._used[hop.node] -= state.request.kv_tokens

    def set(self, held: Mapping[str, int], ending: Iterable[InFlight]) -> None:
        """Requests went on another way: what nodes hold now, and requests that are closed in a moment."""
        self._used = {name: held.get(name, 0) for name in self._used}
        self.open(ending)

    def iteration(self, node: SimulatedNode, *, decode_tokens: int, begin_s: float, end_s: float) -> None:
        """An iteration of a node has ended."""
        kv_tokens = self._used[node.name]
        self._histories[node.name].add(begin_s, end_s, decode_tokens=decode_tokens, kv_tokens=kv_tokens)

    def read(self, node: SimulatedNode) -> NodeUse:
        """All counters of a node; the peak begins anew, as when an agent is asked."""
        peak, self._peak[node.name] = self._peak[node.name], self._used[node.name]
        return NodeUse(
            busy_s=node.busy_s,
            iterations=node.iterations,
            prefill_tokens=node.prefill_tokens,
            decode_tokens=node.decode_tokens,
            kv_peak_tokens=peak,
            kv_capacity_tokens=self._capacities[node.name],
        )

    def series(self, now_s: float) -> dict[str, tuple[NodePoint, ...]]:
        """Node -> its series over the run."""
        return {
            name: tuple(node_points(history.read(now_s), read_s=now_s)) for name, history in self._histories.items()
        }


class Snapshot(msgspec.Struct, frozen=True):
    """Counters of all nodes and links, and of the tokens that came out, at a moment."""

    nodes: dict[str, NodeUse]
    links: dict[tuple[str, str], tuple[int, int]]  # (from, to) -> (messages, tokens)
    prompt_tokens: int
    output_tokens: int


def snapshot(cluster: SimulatedCluster, kv_use: KvUse, *, prompt_tokens: int, output_tokens: int) -> Snapshot:
    """Read all counters."""
    nodes = {name: kv_use.read(node) for name, node in cluster.nodes.items()}
    links = {ends: (count.messages, count.tokens) for ends, count in cluster.link_counts.items()}
    return Snapshot(nodes, links, prompt_tokens, output_tokens)


def node_uses(begin: Snapshot, end: Snapshot) -> dict[str, NodeUse]:
    """What each node did between the two."""
    return {
        name: msgspec.structs.replace(
            after,
            busy_s=after.busy_s - begin.nodes[name].busy_s,
            iterations=after.iterations - begin.nodes[name].iterations,
            prefill_tokens=after.prefill_tokens - begin.nodes[name].prefill_tokens,
            decode_tokens=after.decode_tokens - begin.nodes[name].decode_tokens,
        )
        for name, after in end.nodes.items()
    }


def link_uses(begin: Snapshot, end: Snapshot, cluster: SimulatedCluster) -> tuple[LinkUse, ...]:
    """What crossed each link between the two, in the order of their names."""
    uses = []
    for (src, dst), (messages, tokens) in sorted(end.links.items()):
        messages_before, tokens_before = begin.links.get((src, dst), (0, 0))
        crossed = tokens - tokens_before
        uses.append(
            LinkUse(
                src=src,
                dst=dst,
                payload_bytes=round(crossed * cluster.link_counts[src, dst].bytes_per_token),
                messages=messages - messages_before,
                tokens=crossed,
            )
        )
    return tuple(uses)
