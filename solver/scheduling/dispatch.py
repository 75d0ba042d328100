"""Dispatch: the coordinator's decisions as messages to nodes. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import msgspec

from helixbench.solver.problem.plan import Hop, Pipeline
from helixbench.solver.scheduling.requests import Actions, InFlight, Moved
from helixbench.solver.scheduling.work import OpenRequest, WorkItem


class Outgoing(msgspec.Struct):
    """One message to one node: the parts of a ``Work``, and the token ids of its items."""

    items: list[WorkItem] = []
    opens: list[OpenRequest] = []
    closes: list[int] = []
    tokens: list[int] = []


def messages_of(actions: Actions, pipelines: Sequence[Pipeline], *, lost: Collection[str]) -> dict[str, Outgoing]:
    """The actions as one message to each node that they concern (node -> message).

    Args:
        actions: what the coordinator decided.
        pipelines: the router's, by index.
        lost: nodes that get nothing, for their caches are gone.
    """
    messages: dict[str, Outgoing] = {}

    def to(hop: Hop) -> Outgoing:
        return messages.setdefault(hop.node, Outgoing())

    for state in actions.ended:
        for hop in pipelines[state.pipeline]:
            if hop.node not in lost:
                to(hop).closes.append(state.attempt)
    for moved in actions.moved:
        _move(moved, to)
    for group in actions.going.values():
        first = to(pipelines[group.pipeline][0])
        for state in group.members:
            past = state.context_tokens - 1
            first.items.append(WorkItem(state.attempt, past, 1, sample=True, is_decode=True))
            first.tokens.append(state.last_token)
    for state in actions.admitted:
        hops = pipelines[state.pipeline]
        opened = _opening(state, hops)
        for hop in hops:
            to(hop).opens.append(opened)
        first = to(hops[0])
        first.items.append(WorkItem(state.attempt, 0, len(state.request.prompt), sample=True, is_decode=False))
        first.tokens.extend(state.request.prompt)
    return messages


def _move(moved: Moved, to: Callable[[Hop], Outgoing]) -> None:
    """Messages that close an attempt where its cache is not kept, and open the next one on its new pipeline.

    The tokens that run again enter at ``recovery.first``: as token ids from here, or as what the node before it
    kept. The newest token always comes from here and passes the whole pipeline. It may have been on its way, and
    whatever it left behind belongs to the old attempt. It travels as a prompt does, for decoding sequences would
    overtake the tokens that run again.
    """
    recovery, state = moved.recovery, moved.state
    kept: set[str] = set()
    if recovery is not None:
        kept = {hop.node for hop in recovery.hops} & {hop.node for hop in moved.survivors}
        kept -= recovery.rebuilt_nodes
    for hop in moved.survivors:
        if hop.node not in kept:
            to(hop).closes.append(moved.attempt)
    if recovery is None:
        return
    newest = state.context_tokens - 1  # position of the newest token
    for index, hop in enumerate(recovery.hops):
        to(hop).opens.append(
            _opening(
                state,
                recovery.hops,
                adopts=moved.attempt if hop.node in kept else None,
                replays=newest if index == recovery.first - 1 and recovery.num_rebuilt else 0,
                deliver_from=newest if index == recovery.first + recovery.num_rebuilt - 1 and kept else 0,
            )
        )
    first = to(recovery.hops[0])
    begin = 0 if recovery.first == 0 and recovery.num_rebuilt else newest
    tokens = (*state.request.prompt, *state.output)[begin:]
    first.items.append(WorkItem(state.attempt, begin, len(tokens), sample=True, is_decode=False))
    first.tokens.extend(tokens)


def _opening(
    state: InFlight, hops: Pipeline, *, adopts: int | None = None, replays: int = 0, deliver_from: int = 0
) -> OpenRequest:
    request, sampling = state.request, state.request.sampling
    if sampling.temperature > 0 and sampling.seed is None:
        sampling = msgspec.structs.replace(sampling, seed=request.number)  # the same for every attempt
    return OpenRequest(
        state.attempt,
        hops,
        request.kv_tokens,
        sampling,
        stop_from=len(request.prompt) + request.min_tokens if request.min_tokens else 0,
        stop_token_ids=tuple(sorted(request.stop_token_ids)) if request.min_tokens else (),
        scored=request.prompt if request.is_prompt_scored and not state.output else (),
        adopts=adopts,
        replays=replays,
        deliver_from=deliver_from,
    )
