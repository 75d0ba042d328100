"""Recover: a new pipeline for a request whose node or link was lost, and what has to be computed again. Pure.

What was lost are the KV entries of the layers that one node ran. Every other node still has its own, so a request moves
by giving it a new pipeline and a new epoch; nodes that ran a part of what they ran before keep their caches, and the
others run all tokens so far again. Those tokens enter the new pipeline at the first node that needs them: either from
the node before it, which keeps what it sent (*replay*), or from the coordinator, which has the token ids (*prefill
again*). Replay is the same thing with fewer layers: ``first`` says where in the pipeline the tokens enter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from helixbench.solver.problem.plan import Hop, LayerRange, Pipeline

REPLAY_MEMORY_BYTES = 1 << 30
"""Default of the host memory in which a node keeps the states that it sent on."""

Seconds: TypeAlias = Callable[[Hop, int], float]
"""``(hop, tokens)``: predicted time for a node to run that many tokens of one request through the hop's layers."""


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """How a request goes on.

    Attributes:
        hops: its new pipeline.
        first: index of the hop at which tokens enter again; hops before it keep their caches and run nothing.
        num_rebuilt: hops from ``first`` on whose nodes run all tokens so far again, a kept cache between two lost ones
            included. 0 where no cache was lost, only messages on their way: then the newest token alone enters again.
        seconds: predicted time of running the tokens again, one node after another.
        layers: layers that the tokens run through again.
    """

    hops: Pipeline
    first: int
    num_rebuilt: int
    seconds: float
    layers: int

    @property
    def rebuilt_nodes(self) -> set[str]:
        """Nodes that run all tokens so far again."""
        return {hop.node for hop in self.hops[self.first : self.first + self.num_rebuilt]}

    @property
    def source(self) -> str | None:
        """The node that sends the tokens' states; ``None`` for the coordinator, which sends token ids."""
        return None if self.first == 0 else self.hops[self.first - 1].node


class _Suffix(msgspec.Struct, frozen=True):
    """The best way from a layer to the model's end; ``rebuilt`` counts hops up to the last one that runs again."""

    seconds: float
    hops: Pipeline
    rebuilt: int


def best_recovery(
    before: Pipeline,
    *,
    num_tokens: int,
    placement: Mapping[str, LayerRange],
    num_layers: int,
    is_usable: Callable[[str], bool],
    is_whole: Callable[[str], bool],
    is_connected: Callable[[str | None, str | None], bool],
    keeps_inputs: Callable[[str], bool],
    seconds: Seconds,
) -> Recovery | None:
    """The pipeline on which the request goes on soonest; ``None`` where the nodes that are left cover no pipeline.

    Args:
        before: the pipeline it had; empty where nothing of it is left.
        num_tokens: tokens whose KV entries it had, or was about to have.
        placement: node -> layer range, of the nodes that there are.
        num_layers: of the model.
        is_usable: whether a node works, and has room for the request.
        is_whole: whether a node of ``before`` has the KV entries of all tokens but the newest: not one that was being
            rebuilt when this loss came on top of another.
        is_connected: whether work can go from one node to another; ``None`` is the coordinator.
        keeps_inputs: whether a node still has all states of the request that it sent on.
        seconds: the prediction that ways are compared by.

    The part of the old pipeline in front of the tokens' entry is kept as it is. From there to the end it is a shortest
    path over layer boundaries: a stage ends where its node's range ends, so ends only rise, and no node comes twice.
    """
    cached_from = {hop.node: hop.start for hop in before if is_whole(hop.node)}
    nodes = {node: held for node, held in sorted(placement.items()) if is_usable(node)}
    known: dict[tuple[str | None, int], _Suffix | None] = {}  # (node before, its end) -> best way on from there

    def keeps_cache(hop: Hop) -> bool:
        return cached_from.get(hop.node, num_layers) <= hop.start

    def onward(src: str | None, layer: int) -> _Suffix | None:
        if layer == num_layers:
            return _Suffix(0.0, (), 0) if is_connected(src, None) else None
        key = (src, layer)
        if key not in known:
            found: _Suffix | None = None
            for node, held in nodes.items():
                if not held.start <= layer < held.end or not is_connected(src, node):
                    continue
                rest = onward(node, held.end)
                if rest is None:
                    continue
                hop = Hop(node, layer, held.end)
                runs_again = rest.rebuilt > 0 or not keeps_cache(hop)
                cost = rest.seconds + (seconds(hop, num_tokens) if runs_again else 0.0)
                way = _Suffix(cost, (hop, *rest.hops), rest.rebuilt + 1 if runs_again else 0)
                if found is None or (way.seconds, len(way.hops)) < (found.seconds, len(found.hops)):
                    found = way
            known[key] = found
        return known[key]

    best: Recovery | None = None
    for entry in range(max(1, len(before))):
        kept = before[:entry]
        if kept and not (
            is_usable(kept[-1].node)
            and is_whole(kept[-1].node)
            and is_connected(_node(before, entry - 2), kept[-1].node)
        ):
            break  # nothing beyond a node, cache or link that was lost can be kept in front
        source = _node(before, entry - 1)
        if source is not None and not keeps_inputs(source):
            continue
        way = onward(source, kept[-1].end if kept else 0)
        if way is None or (best is not None and way.seconds >= best.seconds):
            continue
        rebuilt = way.hops[: way.rebuilt]
        best = Recovery(
            hops=(*kept, *way.hops),
            first=entry,
            num_rebuilt=way.rebuilt,
            seconds=way.seconds,
            layers=sum(hop.end - hop.start for hop in rebuilt),
        )
    return best


def _node(pipeline: Pipeline, index: int) -> str | None:
    return pipeline[index].node if index >= 0 else None


def by_layers(hop: Hop, tokens: int) -> float:
    """As many as layers times tokens, where nothing better is known."""
    return float((hop.end - hop.start) * tokens)


@dataclass(frozen=True)
class Paths:
    """Where requests can go: what a coordinator has to know to recover them.

    Attributes:
        placement: node -> layer range.
        num_layers: of the model.
        is_connected: whether the profile has a link from one node to another; ``None`` is the coordinator.
        seconds: predicted time of running tokens again; by default as many as layers times tokens.
    """

    placement: Mapping[str, LayerRange]
    num_layers: int
    is_connected: Callable[[str | None, str | None], bool] = lambda _src, _dst: True
    seconds: Seconds = by_layers

    def is_covered_by(self, nodes: Collection[str], links_down: Collection[tuple[str, str]] = ()) -> bool:
        """Whether some pipeline leads through these nodes alone."""
        found = best_recovery(
            (),
            num_tokens=0,
            placement=self.placement,
            num_layers=self.num_layers,
            is_usable=lambda node: node in nodes,
            is_whole=lambda _node: False,
            is_connected=lambda src, dst: (src, dst) not in links_down and self.is_connected(src, dst),
            keeps_inputs=lambda _node: False,
            seconds=self.seconds,
        )
        return found is not None
