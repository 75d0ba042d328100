"""Coordinator: the life of a request, from arrival to its last token. Pure: an event in, actions out.

It admits a request when every node of its pipeline has KV slots free for the longest that the request can become. So no
node ever runs out of KV cache, and an admitted request is never preempted.

Where a node or link on a request's pipeline is lost, the request goes on as a new attempt on another one: at once where
there is room, otherwise as soon as there is, before new requests. Nothing that was admitted is lost.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal

import msgspec

from helixbench.solver.problem.plan import Hop, Pipeline
from helixbench.solver.scheduling.recover import Paths, Recovery, best_recovery
from helixbench.solver.scheduling.router import Chooser
from helixbench.solver.scheduling.work import OpenRequest, SamplingParams, Scores, WorkItem, attempt_of, number_of

FinishReason = Literal["", "stop", "length", "abort", "error"]


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
    reason: FinishReason = ""
    output: list[int] = []  # tokens so far; empty in simulations, where only their number counts
    epoch: int = 0  # rises with every pipeline that it goes on with
    without_inputs: set[str] = set()  # nodes that no longer keep all they sent on of it
    is_proven: bool = False  # this attempt gave a token: each node of its pipeline has the KV entries of all before it
    whole: set[str] = set()  # until then, nodes that have them from earlier attempts

    @property
    def attempt(self) -> int:
        """What nodes know the request by."""
        return attempt_of(self.request.number, self.epoch)

    @property
    def last_token(self) -> int:
        """The newest of its tokens."""
        return self.output[-1] if self.output else self.request.prompt[-1]

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


class Moved(msgspec.Struct, frozen=True):
    """A request that left a pipeline: ``recovery`` is how it goes on, ``None`` where it has to wait for room.

    ``survivors`` are the hops of the pipeline it left whose nodes work, ``attempt`` is what they know it by.
    """

    state: InFlight
    attempt: int
    survivors: Pipeline
    recovery: Recovery | None


class Actions(msgspec.Struct):
    """What follows from an event: who ended, who goes on, who was admitted, and what clients are to be told."""

    ended: list[InFlight] = []
    going: dict[int, DecodeGroup] = {}  # pipeline -> sequences that take another token
    admitted: list[InFlight] = []
    moved: list[Moved] = []
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
        paths: where requests can go on after a loss; ``None`` where nothing is ever lost.

    Attributes:
        num_late: tokens that came for an attempt that is over.
        tokens_again: tokens that were sent through layers again, times those layers.
    """

    def __init__(
        self,
        router: Chooser,
        *,
        kv_capacity_tokens: Mapping[str, int],
        max_concurrency: int | None = None,
        paths: Paths | None = None,
    ) -> None:
        self.num_late = 0
        self.tokens_again = 0
        self._paths = paths
        self._lost: frozenset[str] = frozenset()  # nodes whose caches are gone
        self._passed_over: frozenset[str] = frozenset()  # nodes that take no further requests
        self._links_down: frozenset[tuple[str, str]] = frozenset()
        self._router = router
        self._capacity = dict(kv_capacity_tokens)  # node -> KV slots in all
        self._free = dict(kv_capacity_tokens)  # node -> KV slots that no request holds
        self._max_concurrency = math.inf if max_concurrency is None else max_concurrency
        self._largest: int | None = None  # KV slots of the largest request that fits some pipeline, once computed
        self._is_full = False  # the first in the queue found no room, and no slot has been freed since
        self._waiting: OrderedDict[int, Request] = OrderedDict()  # number -> request, in order of arrival
        self._in_flight: dict[int, InFlight] = {}  # request number -> its state
        self._recovering: dict[int, InFlight] = {}  # the same of those that wait for a new pipeline, without KV slots

    @property
    def num_waiting(self) -> int:
        """Requests not yet admitted."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Requests that hold KV slots."""
        return len(self._in_flight)

    @property
    def num_recovering(self) -> int:
        """Admitted requests that wait for a new pipeline."""
        return len(self._recovering)

    @property
    def is_covered(self) -> bool:
        """Whether the nodes that take requests still cover the model."""
        if self._paths is None:
            return True
        usable = self._capacity.keys() - self._lost - self._passed_over
        return self._paths.is_covered_by(usable, self._links_down)

    @property
    def kv_held_tokens(self) -> Mapping[str, int]:
        """Node -> KV slots that requests hold."""
        held = ((node, capacity) for node, capacity in self._capacity.items() if node not in self._lost)
        return {node: capacity - self._free[node] for node, capacity in held}

    @property
    def kv_usage(self) -> float:
        """Share of its KV slots that requests hold on the fullest node."""
        held = ((node, capacity) for node, capacity in self._capacity.items() if node not in self._lost)
        return max((1 - self._free[node] / capacity for node, capacity in held), default=0.0)

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
        if len(new) < len(requests) or any(self._is_known(number) for number in new):
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
        """A last stage sampled tokens, as (attempt, token), some of them with ``scores``.

        A token of an attempt that is over is late: it is counted and changes nothing.
        """
        given = []
        for attempt, token in tokens:
            state = self._in_flight.get(number_of(attempt))
            if state is None or state.attempt != attempt:
                self.num_late += 1
            else:
                given.append((state, token))
        groups: dict[int, DecodeGroup] = {}  # pipeline -> its sequences
        for state, token in given:
            state.output.append(token)
            state.is_proven = True
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
                scores=scores_of.get(state.attempt),
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
        """Admit requests in order of arrival while there is room, each to the pipeline that the router chooses.

        Those that lost their pipeline come first: while one of them waits for room, no new request takes it away.
        """
        actions = Actions() if onto is None else onto
        for state in list(self._recovering.values()):
            self._recover(state, (), actions)
        if self._recovering:
            return actions
        while self._waiting and not self._is_full and len(self._in_flight) < self._max_concurrency:
            request = next(iter(self._waiting.values()))
            need = request.kv_tokens
            full = {node for node, free in self._free.items() if free < need} | self._lost | self._passed_over

            def has_room(pipeline: Pipeline, full: set[str] = full) -> bool:
                if full and any(hop.node in full for hop in pipeline):
                    return False
                return not self._links_down or not self._crosses_link_down(pipeline)

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
        elif self._waiting.pop(number, None) is not None or self._recovering.pop(number, None) is not None:
            self._is_full = False
            actions.events.append(_without_token(number, None, "abort"))
        return actions

    def observe(
        self,
        *,
        lost: Collection[str],
        passed_over: Collection[str] = (),
        links_down: Collection[tuple[str, str]] = (),
    ) -> Actions:
        """The state of nodes and links is now this. Requests whose pipeline is broken by it go on another way.

        Args:
            lost: nodes whose caches are gone; one that is no longer among them is back, and empty.
            passed_over: nodes that keep what they have and take no further requests.
            links_down: links that carry nothing, as (from, to).
        """
        for node in self._lost.difference(lost):
            self._free[node] = self._capacity[node]
        self._lost, self._passed_over = frozenset(lost), frozenset(passed_over)
        self._links_down = frozenset(links_down)
        self._is_full = False
        actions = Actions()
        for state in list(self._in_flight.values()):
            pipeline = self._router.pipelines[state.pipeline]
            if self._crosses_link_down(pipeline) or any(hop.node in self._lost for hop in pipeline):
                self._leave(state, actions)
        return self.admit(onto=actions)

    def cannot_replay(self, attempt: int, node: str) -> Actions:
        """The node no longer keeps what it sent on of the attempt: its tokens have to enter somewhere before it."""
        actions = Actions()
        state = self._in_flight.get(number_of(attempt))
        if state is not None and state.attempt == attempt:
            state.without_inputs.add(node)
            self._leave(state, actions)
        return self.admit(onto=actions)

    def failed(self, attempts: Iterable[int]) -> Actions:
        """A node could not run these: the requests end with an error."""
        actions = Actions()
        for attempt in attempts:
            state = self._in_flight.get(number_of(attempt))
            if state is not None and state.attempt == attempt:
                state.reason = "error"
                self._release(state)
                actions.ended.append(state)
                actions.events.append(_without_token(state.request.number, state.pipeline, "error"))
        return self.admit(onto=actions)

    def give_up(self) -> Actions:
        """End all that wait with an error: the nodes that are left will not serve them."""
        numbers = [*self._recovering, *self._waiting]
        self._recovering.clear()
        self._waiting.clear()
        self._is_full = False
        return Actions(events=[_without_token(number, None, "error") for number in numbers])

    def messages(self, actions: Actions) -> dict[str, Outgoing]:
        """The actions as one message to each node that they concern (node -> message)."""
        messages: dict[str, Outgoing] = {}

        def to(hop: Hop) -> Outgoing:
            return messages.setdefault(hop.node, Outgoing())

        pipelines = self._router.pipelines
        for state in actions.ended:
            for hop in pipelines[state.pipeline]:
                if hop.node not in self._lost:
                    to(hop).closes.append(state.attempt)
        for moved in actions.moved:
            self._move(moved, to)
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

    def _move(self, moved: Moved, to: Callable[[Hop], Outgoing]) -> None:
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

    def _leave(self, state: InFlight, actions: Actions) -> None:
        """The request leaves its pipeline; the slots that it held there are free for its own way on, too."""
        before = self._router.pipelines[state.pipeline]
        del self._in_flight[state.request.number]
        self._give_back(state)
        self._recovering[state.request.number] = state
        self._recover(state, before, actions)

    def _recover(self, state: InFlight, before: Pipeline, actions: Actions) -> None:
        """Go on with the way that runs the fewest tokens again, if there is one with room; else wait without slots."""
        need, attempt = state.request.kv_tokens, state.attempt
        survivors = tuple(hop for hop in before if hop.node not in self._lost)

        def is_usable(node: str) -> bool:
            takes_it = node not in self._passed_over or any(hop.node == node for hop in survivors)
            return takes_it and node not in self._lost and self._free[node] >= need

        whole = {hop.node for hop in survivors}
        if not state.is_proven:
            whole &= state.whole
        recovery = None
        if self._paths is not None:
            paths = self._paths
            recovery = best_recovery(
                before,
                num_tokens=state.context_tokens,
                placement=paths.placement,
                num_layers=paths.num_layers,
                is_usable=is_usable,
                is_whole=whole.__contains__,
                is_connected=lambda src, dst: (src, dst) not in self._links_down and paths.is_connected(src, dst),
                keeps_inputs=lambda node: node not in state.without_inputs,
                seconds=paths.seconds,
            )
        if recovery is not None:
            del self._recovering[state.request.number]
            self._in_flight[state.request.number] = state
            state.epoch += 1
            state.is_proven, state.whole = False, whole - recovery.rebuilt_nodes
            state.pipeline = self._router.index_of(recovery.hops)
            for hop in recovery.hops:
                self._free[hop.node] -= need
            self.tokens_again += recovery.layers * state.context_tokens
        if recovery is not None or before:
            actions.moved.append(Moved(state, attempt, survivors, recovery))

    def _release(self, state: InFlight) -> None:
        state.reason = state.reason or "length"
        del self._in_flight[state.request.number]
        self._is_full = False
        self._give_back(state)

    def _give_back(self, state: InFlight) -> None:
        self._router.ended(state.pipeline)
        for hop in self._router.pipelines[state.pipeline]:
            self._free[hop.node] += state.request.kv_tokens

    def _crosses_link_down(self, pipeline: Pipeline) -> bool:
        pairs = itertools.pairwise(hop.node for hop in pipeline)
        return bool(self._links_down) and any(pair in self._links_down for pair in pairs)

    def _is_known(self, number: int) -> bool:
        return number in self._waiting or number in self._in_flight or number in self._recovering


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


def _without_token(number: int, pipeline: int | None, reason: FinishReason) -> TokenEvent:
    return TokenEvent(request=number, token=None, pipeline=pipeline, reason=reason)
