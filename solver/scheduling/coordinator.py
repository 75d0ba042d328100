"""Coordinator: the life of a request, from arrival to its last token. Pure: an event in, actions out.

It admits a request when every node of its pipeline has KV slots free for the longest that the request can become. So no
node ever runs out of KV cache, and an admitted request is never preempted.
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


class InFlight(msgspec.Struct, eq=False):
    """An admitted request. It ends with output token number ``ends_at``; ``reason`` says why, once that is known."""

    request: Request
    pipeline: int
    ends_at: int
    num_output: int = 0
    last_token: int = 0
    reason: FinishReason = ""

    @property
    def context_tokens(self) -> int:
        """Cached tokens that its next decode step reads, its own included."""
        return len(self.request.prompt) + self.num_output

    def end_with_next(self, reason: FinishReason) -> None:
        """End the request with its next token, whatever that is."""
        self.ends_at, self.reason = self.num_output + 1, reason


class DecodeGroup(msgspec.Struct, eq=False):
    """Sequences of one pipeline that take their next token together; ``context_tokens`` is the sum over ``members``.

    The coordinator decides about groups and the simulator moves them whole, so that an event costs about the same for
    one sequence as for a hundred. Nodes of a server run the members one by one.
    """

    pipeline: int
    members: list[InFlight]
    context_tokens: int

    @classmethod
    def of(cls, member: InFlight) -> DecodeGroup:
        """A group of one."""
        return cls(member.pipeline, [member], member.context_tokens)

    @property
    def count(self) -> int:
        """Number of sequences."""
        return len(self.members)

    def take(self, count: int) -> DecodeGroup:
        """Remove the first ``count`` sequences and return them."""
        members, self.members = self.members[:count], self.members[count:]
        context_tokens = sum(member.context_tokens for member in members)
        self.context_tokens -= context_tokens
        return DecodeGroup(self.pipeline, members, context_tokens)


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A request got a token (``None`` when it was aborted instead); ``reason`` is set with its last one.

    ``pipeline`` is ``None`` where the request was aborted before it had one, ``scores`` where none were asked for.
    """

    request: int
    token: int | None
    pipeline: int | None
    reason: FinishReason
    scores: Scores | None = None


class Actions(msgspec.Struct):
    """What follows from an event: who ended, who goes on, who was admitted, and what clients are to be told."""

    ended: list[InFlight] = []
    going: dict[int, DecodeGroup] = {}  # pipeline -> sequences that take another token
    admitted: list[InFlight] = []
    events: list[TokenEvent] = []


class Outgoing(msgspec.Struct):
    """One message to one node: the parts of a ``Work``, and the token ids of its items."""

    items: list[WorkItem] = []
    opens: list[OpenRequest] = []
    closes: list[int] = []
    tokens: list[int] = []


class Coordinator:
    """Requests in and tokens out, over a router's pipelines.

    Args:
        router: chooses pipelines.
        kv_capacity_tokens: node -> KV slots that admission may fill.
        max_concurrency: requests in flight at most; ``None`` for as many as the KV caches hold.
    """

    def __init__(
        self, router: Chooser, *, kv_capacity_tokens: Mapping[str, int], max_concurrency: int | None = None
    ) -> None:
        self._router = router
        self._capacity = dict(kv_capacity_tokens)  # node -> KV slots in all
        self._free = dict(kv_capacity_tokens)  # node -> KV slots that no request holds
        self._max_concurrency = math.inf if max_concurrency is None else max_concurrency
        self._largest: int | None = None  # KV slots of the largest request that fits some pipeline, once computed
        self._is_full = False  # the first in the queue found no room, and no slot has been freed since
        self._waiting: OrderedDict[int, Request] = OrderedDict()  # number -> request, in order of arrival
        self._in_flight: dict[int, InFlight] = {}  # request number -> its state

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

    @property
    def kv_usage(self) -> float:
        """Share of its KV slots that requests hold on the fullest node."""
        return max(1 - self._free[node] / capacity for node, capacity in self._capacity.items())

    def largest_request_tokens(self) -> int:
        """KV slots of the largest request that some pipeline can hold at all."""
        if self._largest is None:
            self._largest = self._router.widest(self._capacity)
        return self._largest

    def submit(self, requests: Iterable[Request], *, onto: Actions | None = None) -> Actions:
        """New requests arrive. ``onto`` are actions of the same moment, which are extended.

        Raises:
            ValueError: an empty prompt, no output wanted, a request that no pipeline can hold even when empty, or the
                number of one that has not ended. No request of the list is taken then.
        """
        requests = list(requests)
        largest = self.largest_request_tokens()
        new = {request.number: request for request in requests}
        if len(new) < len(requests) or any(number in self._waiting or number in self._in_flight for number in new):
            raise ValueError("two requests that have not ended share a number; numbers must differ")
        for request in requests:
            if not request.prompt or request.max_tokens < 1:
                raise ValueError("need a prompt and an output of at least 1 token each")
            if request.kv_tokens > largest:
                raise ValueError(
                    f"{len(request.prompt)} prompt and {request.max_tokens} output tokens need {request.kv_tokens} KV "
                    f"slots; the largest that a pipeline holds is {largest}"
                )
        self._waiting.update(new)
        return self.admit(onto=onto)

    def sampled(self, tokens: Iterable[tuple[int, int]], scores: Iterable[Scores] = ()) -> Actions:
        """A last stage sampled tokens, as (request number, token), some of them with ``scores``.

        Raises:
            KeyError: a token for a request that is not in flight: a node answered twice or for another run.
        """
        given = [(self._in_flight[number], token) for number, token in tokens]
        groups: dict[int, DecodeGroup] = {}  # pipeline -> its sequences
        for state, token in given:
            state.last_token = token
            if token in state.request.stop_token_ids and state.num_output >= state.request.min_tokens:
                state.end_with_next(state.reason or "stop")
            group = groups.setdefault(state.pipeline, DecodeGroup(state.pipeline, [], 0))
            group.members.append(state)
            group.context_tokens += state.context_tokens
        actions = self.advance(groups.values())
        scores_of = {one.request: one for one in scores}
        actions.events += [
            TokenEvent(
                request=state.request.number,
                token=None if state.reason == "abort" else token,
                pipeline=state.pipeline,
                reason=state.reason,
                scores=scores_of.get(state.request.number),
            )
            for state, token in given
        ]
        return self.admit(onto=actions)

    def advance(self, groups: Iterable[DecodeGroup]) -> Actions:
        """Every sequence of these groups has got a token. Who has all of theirs frees its slots; nobody is admitted."""
        actions = Actions()
        for group in groups:
            ended = []
            for state in group.members:
                state.num_output += 1
                if state.num_output == state.ends_at:
                    ended.append(state)
            context_tokens = group.context_tokens + len(group.members) - sum(state.context_tokens for state in ended)
            members = [state for state in group.members if state.num_output < state.ends_at] if ended else group.members
            merged = actions.going.get(group.pipeline)
            if merged is not None:
                merged.members += members
                merged.context_tokens += context_tokens
            elif members:
                actions.going[group.pipeline] = DecodeGroup(group.pipeline, members, context_tokens)
            actions.ended += ended
        for state in actions.ended:
            self._release(state)
        return actions

    def admit(self, *, onto: Actions | None = None) -> Actions:
        """Admit requests in order of arrival while there is room, each to the pipeline that the router chooses."""
        actions = Actions() if onto is None else onto
        while self._waiting and not self._is_full and len(self._in_flight) < self._max_concurrency:
            request = next(iter(self._waiting.values()))
            need = request.kv_tokens
            full = {node for node, free in self._free.items() if free < need}

            def has_room(pipeline: Pipeline, full: set[str] = full) -> bool:
                return not full or all(hop.node not in full for hop in pipeline)

            index = self._router.choose(has_room)
            if index is None:
                self._is_full = True
                break
            self._waiting.popitem(last=False)
            state = InFlight(request, index, ends_at=request.max_tokens)
            self._in_flight[request.number] = state
            for hop in self._router.pipelines[index]:
                self._free[hop.node] -= need
            actions.admitted.append(state)
        return actions

    def abort(self, number: int) -> Actions:
        """The client has gone. Slots are freed when the token under way is back: nothing late is left in the nodes."""
        actions = Actions()
        state = self._in_flight.get(number)
        if state is not None:
            state.end_with_next("abort")
        elif self._waiting.pop(number, None) is not None:
            self._is_full = False
            actions.events.append(TokenEvent(request=number, token=None, pipeline=None, reason="abort"))
        return actions

    def messages(self, actions: Actions) -> dict[str, Outgoing]:
        """The actions as one message to each node that they concern (node -> message)."""
        messages: dict[str, Outgoing] = {}

        def to(hop: Hop) -> Outgoing:
            return messages.setdefault(hop.node, Outgoing())

        pipelines = self._router.pipelines
        for state in actions.ended:
            for hop in pipelines[state.pipeline]:
                to(hop).closes.append(state.request.number)
        for group in actions.going.values():
            first = to(pipelines[group.pipeline][0])
            for state in group.members:
                past = state.context_tokens - 1
                first.items.append(WorkItem(state.request.number, past, 1, sample=True, is_decode=True))
                first.tokens.append(state.last_token)
        for state in actions.admitted:
            request, hops = state.request, pipelines[state.pipeline]
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
                to(hop).opens.append(opened)
            first = to(hops[0])
            first.items.append(WorkItem(request.number, 0, len(request.prompt), sample=True, is_decode=False))
            first.tokens.extend(request.prompt)
        return messages

    def _release(self, state: InFlight) -> None:
        request = state.request
        state.reason = state.reason or "length"
        del self._in_flight[request.number]
        self._router.ended(state.pipeline)
        self._is_full = False
        for hop in self._router.pipelines[state.pipeline]:
            self._free[hop.node] += request.kv_tokens
