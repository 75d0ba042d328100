"""Coordinator: the life of a request, from its arrival to its last token. Pure: (event, now) -> actions.

It admits a request when every node of its pipeline has KV slots free for the longest that it can become, so no node
ever runs out, and a request that was let in is never thrown out.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from helixbench.solver.problem.plan import Hop, Pipeline
from helixbench.solver.scheduling.router import Chooser
from helixbench.solver.scheduling.work import OpenRequest, SamplingParams, Scores, WorkItem

FinishReason = Literal["", "stop", "length", "abort"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks for.

    Attributes:
        stop_token_ids: end the output, and are its last token; none of them comes before ``min_tokens`` others.
        is_prompt_scored: the first token's event brings the log probabilities of the prompt's tokens.
    """

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    is_prompt_scored: bool = False

    @property
    def kv_tokens(self) -> int:
        """KV slots that it can need: the last output token is never fed back, so it takes none."""
        return len(self.prompt) + self.max_tokens - 1


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A request got a token (``None`` when it was aborted instead); ``reason`` is set with its last one.

    ``pipeline`` is ``None`` where it was aborted before it had one; ``scores`` where none were asked for.
    """

    request: int
    token: int | None
    pipeline: int | None
    reason: FinishReason
    scores: Scores | None = None


class Outgoing(msgspec.Struct):
    """What goes to one node as one message: the ``Work`` being put together, and the token ids of its items."""

    items: list[WorkItem] = []
    opens: list[OpenRequest] = []
    closes: list[int] = []
    tokens: list[int] = []


class Actions(msgspec.Struct, frozen=True):
    """What the caller is to do: send these (node -> one message), and tell clients of these events."""

    sends: dict[str, Outgoing]
    events: list[TokenEvent]


class _InFlight(msgspec.Struct):
    request: Request
    pipeline: int
    num_output: int = 0
    is_aborted: bool = False


class Coordinator:
    """Requests in and tokens out, over a router's pipelines.

    Args:
        router: picks pipelines.
        kv_capacity_tokens: node -> KV slots that it holds.
        max_concurrency: requests in flight at most; ``None`` for as many as the KV caches hold.
    """

    def __init__(
        self, router: Chooser, *, kv_capacity_tokens: Mapping[str, int], max_concurrency: int | None = None
    ) -> None:
        self._router = router
        self._capacity = dict(kv_capacity_tokens)  # node -> KV slots in all
        self._free = dict(kv_capacity_tokens)  # node -> KV slots that no request holds
        self._max_concurrency = max_concurrency
        self._largest: int | None = None  # KV slots that some pipeline holds; worked out when first asked for
        self._is_full = False  # the first that waits found no room, and no slot was freed since
        self._waiting: OrderedDict[int, Request] = OrderedDict()  # number -> request, the first to be admitted first
        self._in_flight: dict[int, _InFlight] = {}  # request -> where it is

    @property
    def num_waiting(self) -> int:
        """Requests not yet admitted."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Requests that hold KV slots."""
        return len(self._in_flight)

    @property
    def kv_held_tokens(self) -> Mapping[str, int]:
        """Node -> KV slots that requests hold."""
        return {node: capacity - self._free[node] for node, capacity in self._capacity.items()}

    def largest_request_tokens(self) -> int:
        """KV slots of the largest request that some pipeline can hold at all."""
        if self._largest is None:
            self._largest = self._router.widest(self._capacity)
        return self._largest

    def submit(self, requests: Iterable[Request], *, onto: Actions | None = None) -> Actions:
        """New requests arrive; ``onto`` are actions of the same moment, to travel in the same messages.

        Raises:
            ValueError: an empty prompt, no output wanted, a request that no pipeline can hold even when empty, or the
                number of one that has not ended. None of them is let in then.
        """
        requests = list(requests)
        largest = self.largest_request_tokens()
        new = {request.number: request for request in requests}
        if len(new) < len(requests) or any(number in self._waiting or number in self._in_flight for number in new):
            raise ValueError("two requests that have not ended have one number; numbers must differ")
        for request in requests:
            if not request.prompt or request.max_tokens < 1:
                raise ValueError("need a prompt and an output of at least 1 token each")
            if request.kv_tokens > largest:
                raise ValueError(
                    f"{len(request.prompt)} prompt and {request.max_tokens} output tokens need {request.kv_tokens} KV "
                    f"slots; the largest that a pipeline holds is {largest}"
                )
        self._waiting.update(new)
        actions = Actions({}, []) if onto is None else onto
        self._admit(actions)
        return actions

    def sampled(self, tokens: Iterable[tuple[int, int]], scores: Iterable[Scores] = ()) -> Actions:
        """A last stage sampled tokens, as (request, token), some of them with ``scores``.

        Raises:
            KeyError: a token for a request that is not in flight: a node answered twice or for another run.
        """
        actions = Actions({}, [])
        scores_of = {one.request: one for one in scores}
        for number, token in tokens:
            self._advance(self._in_flight[number], token, scores_of.get(number), actions)
        self._admit(actions)
        return actions

    def abort(self, number: int) -> Actions:
        """The client has gone. Slots are freed when the token under way is back: nothing late is left in the nodes."""
        actions = Actions({}, [])
        state = self._in_flight.get(number)
        if state is not None:
            state.is_aborted = True
        elif self._waiting.pop(number, None) is not None:
            self._is_full = False
            actions.events.append(TokenEvent(request=number, token=None, pipeline=None, reason="abort"))
        return actions

    def _advance(self, state: _InFlight, token: int, scores: Scores | None, actions: Actions) -> None:
        request = state.request
        state.num_output += 1
        reason: FinishReason = ""
        if state.is_aborted:
            reason = "abort"
        elif token in request.stop_token_ids and state.num_output > request.min_tokens:
            reason = "stop"
        elif state.num_output == request.max_tokens:
            reason = "length"
        actions.events.append(
            TokenEvent(
                request=request.number,
                token=None if reason == "abort" else token,
                pipeline=state.pipeline,
                reason=reason,
                scores=scores,
            )
        )
        hops = self._router.pipelines[state.pipeline]
        if reason:
            del self._in_flight[request.number]
            self._router.ended(state.pipeline)
            self._is_full = False
            for hop in hops:
                self._free[hop.node] += request.kv_tokens
                _to(actions, hop).closes.append(request.number)
            return
        past = len(request.prompt) + state.num_output - 1
        message = _to(actions, hops[0])
        message.items.append(WorkItem(request.number, past, 1, sample=True, is_decode=True))
        message.tokens.append(token)

    def _admit(self, actions: Actions) -> None:
        most = math.inf if self._max_concurrency is None else self._max_concurrency
        while self._waiting and not self._is_full and len(self._in_flight) < most:
            request = next(iter(self._waiting.values()))
            need = request.kv_tokens
            full = {node for node, free in self._free.items() if free < need}

            def has_room(pipeline: Pipeline, full: set[str] = full) -> bool:
                return not full or all(hop.node not in full for hop in pipeline)

            index = self._router.choose(has_room)
            if index is None:
                self._is_full = True
                return
            self._waiting.popitem(last=False)
            self._start(request, index, actions)

    def _start(self, request: Request, index: int, actions: Actions) -> None:
        hops = self._router.pipelines[index]
        self._in_flight[request.number] = _InFlight(request, index)
        opened = OpenRequest(
            request.number,
            hops,
            request.kv_tokens,
            request.sampling,
            stop_from=len(request.prompt) + request.min_tokens if request.min_tokens else 0,
            stop_token_ids=tuple(sorted(request.stop_token_ids)) if request.min_tokens else (),
            scored=request.prompt if request.is_prompt_scored else (),
        )
        for hop in hops:
            self._free[hop.node] -= request.kv_tokens
            _to(actions, hop).opens.append(opened)
        message = _to(actions, hops[0])
        message.items.append(WorkItem(request.number, 0, len(request.prompt), sample=True, is_decode=False))
        message.tokens.extend(request.prompt)


def _to(actions: Actions, hop: Hop) -> Outgoing:
    if hop.node not in actions.sends:
        actions.sends[hop.node] = Outgoing()
    return actions.sends[hop.node]
