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
from collections.abc import Collection, Iterable, Mapping

from helixbench.solver.problem.plan import Pipeline
from helixbench.solver.scheduling.dispatch import Outgoing, messages_of
from helixbench.solver.scheduling.recover import Paths, best_recovery
from helixbench.solver.scheduling.requests import (
    Actions,
    DecodeGroup,
    FinishReason,
    InFlight,
    Moved,
    Request,
    TokenEvent,
)
from helixbench.solver.scheduling.router import Chooser
from helixbench.solver.scheduling.work import Scores, number_of


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
        self._is_stuck = False  # those that recover found no room, and no slot has been freed since
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
                state.is_proven = True
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
        if self._recovering and not self._is_stuck:
            # They differ in the slots that they need alone: where one found no room, no larger one will.
            refused: float = math.inf
            for state in list(self._recovering.values()):
                if state.request.kv_tokens < refused and not self._recover(state, (), actions):
                    refused = state.request.kv_tokens
            self._is_stuck = bool(self._recovering)
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
        self._is_full = self._is_stuck = False
        actions = Actions()
        for state in list(self._in_flight.values()):
            pipeline = self._router.pipelines[state.pipeline]
            if self._crosses_link_down(pipeline) or any(hop.node in self._lost for hop in pipeline):
                self._leave(state, actions)
        return self.admit(onto=actions)

    def replace(self, kv_capacity_tokens: Mapping[str, int], paths: Paths) -> Actions:
        """Nodes hold other layers from now on, and nothing else of their past; all are to be loaded first.

        Requests in flight wait for that; those that no node can hold any more end with an error.
        """
        assert not self._in_flight, "a plan is replaced only where no pipeline works any more"
        self._capacity, self._free = dict(kv_capacity_tokens), dict(kv_capacity_tokens)
        self._paths = paths
        self._lost, self._passed_over, self._links_down = frozenset(self._capacity), frozenset(), frozenset()
        self._largest = None
        self._is_full = self._is_stuck = False
        for state in self._recovering.values():
            state.whole, state.without_inputs = set(), set()
        largest = self.largest_request_tokens()
        requests = [*(state.request for state in self._recovering.values()), *self._waiting.values()]
        too_large = [request.number for request in requests if request.kv_tokens > largest]
        for number in too_large:
            self._waiting.pop(number, None)
            self._recovering.pop(number, None)
        return Actions(events=[_without_token(number, None, "error") for number in too_large])

    def cannot_replay(self, attempt: int, node: str) -> Actions:
        """The node no longer keeps what it sent on of the attempt: its tokens have to enter somewhere before it."""
        actions = Actions()
        state = self._in_flight.get(number_of(attempt))
        if state is not None and state.attempt == attempt:
            state.without_inputs.add(node)
            self._leave(state, actions)
        return self.admit(onto=actions)

    def failed(self, attempts: Iterable[int], detail: str = "") -> Actions:
        """A node could not run these, for the reason that it gives: the requests end with an error."""
        actions = Actions()
        for attempt in attempts:
            state = self._in_flight.get(number_of(attempt))
            if state is not None and state.attempt == attempt:
                state.reason = "error"
                self._release(state)
                actions.ended.append(state)
                actions.events.append(_without_token(state.request.number, state.pipeline, "error", detail))
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
        return messages_of(actions, self._router.pipelines, lost=self._lost)

    def _leave(self, state: InFlight, actions: Actions) -> None:
        """The request leaves its pipeline; the slots that it held there are free for its own way on, too."""
        before = self._router.pipelines[state.pipeline]
        del self._in_flight[state.request.number]
        self._give_back(state)
        self._recovering[state.request.number] = state
        self._recover(state, before, actions)

    def _recover(self, state: InFlight, before: Pipeline, actions: Actions) -> bool:
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
            self._router.began(state.pipeline)
            for hop in recovery.hops:
                self._free[hop.node] -= need
            self.tokens_again += recovery.layers * state.context_tokens
        if recovery is not None or before:
            actions.moved.append(Moved(state, attempt, survivors, recovery))
        return recovery is not None

    def _release(self, state: InFlight) -> None:
        state.reason = state.reason or "length"
        del self._in_flight[state.request.number]
        self._is_full = False
        self._give_back(state)

    def _give_back(self, state: InFlight) -> None:
        self._is_stuck = False
        self._router.ended(state.pipeline)
        for hop in self._router.pipelines[state.pipeline]:
            self._free[hop.node] += state.request.kv_tokens

    def _crosses_link_down(self, pipeline: Pipeline) -> bool:
        pairs = itertools.pairwise(hop.node for hop in pipeline)
        return bool(self._links_down) and any(pair in self._links_down for pair in pairs)

    def _is_known(self, number: int) -> bool:
        return number in self._waiting or number in self._in_flight or number in self._recovering


def _without_token(number: int, pipeline: int | None, reason: FinishReason, detail: str = "") -> TokenEvent:
    return TokenEvent(request=number, token=None, pipeline=pipeline, reason=reason, detail=detail)
