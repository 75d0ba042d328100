from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixbench.solver.problem.plan import Pipeline
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.requests import Actions, Request, TokenEvent
from helixbench.solver.scheduling.router import Router
from helixbench.solver.scheduling.work import OpenRequest, SamplingParams, Scores, TokenScore, WorkItem
from tests.solver.scheduling.test_router import pipeline

CAPACITY = {"a": 60, "b": 40, "c": 30, "d": 50}
PIPELINES = (pipeline("a", "b"), pipeline("a", "c"), pipeline("d"))
STOP = 7


class Nodes:
    """Nodes that believe what they are told, and check that none is asked for more than it has."""

    def __init__(self, coordinator: Coordinator, capacity: dict[str, int]) -> None:
        self.coordinator = coordinator
        self.capacity = capacity
        self.used = dict.fromkeys(CAPACITY, 0)
        self.open: dict[str, dict[int, OpenRequest]] = {node: {} for node in CAPACITY}
        self.busy: dict[int, list[WorkItem]] = {}  # request -> the item under way
        self.given: dict[int, list[int]] = {}  # request -> token ids that went to its first node
        self.admitted: list[int] = []
        self.events: list[TokenEvent] = []

    def take(self, actions: Actions) -> None:
        self.events += actions.events
        messages = self.coordinator.messages(actions)
        self.admitted += sorted({o.request for outgoing in messages.values() for o in outgoing.opens})
        for node, outgoing in messages.items():
            assert outgoing.items or outgoing.opens or outgoing.closes, "an empty message"
            for request in outgoing.closes:
                self.used[node] -= self.open[node].pop(request).kv_tokens
            for opened in outgoing.opens:
                assert opened.request not in self.open[node]
                self.open[node][opened.request] = opened
                self.used[node] += opened.kv_tokens
            assert self.used[node] <= self.capacity[node], f"the KV cache of {node} is over-committed"
        for node, outgoing in messages.items():
            start = 0
            for item in outgoing.items:
                opened = self.open[node][item.request]
                assert node == opened.hops[0].node, "work enters a pipeline at its first node"
                assert all(item.request in self.open[hop.node] for hop in opened.hops)
                assert item.request not in self.busy, "a request has two items under way"
                assert item.past + item.num_tokens <= opened.kv_tokens
                assert item.past == len(self.given.get(item.request, ()))
                assert item.sample
                assert item.is_decode == (item.past > 0)
                self.busy[item.request] = [item]
                tokens = outgoing.tokens[start : start + item.num_tokens]
                assert len(tokens) == item.num_tokens
                self.given.setdefault(item.request, []).extend(tokens)
                start += item.num_tokens
            assert start == len(outgoing.tokens)

    def sample(self, tokens: list[tuple[int, int]]) -> None:
        for request, _ in tokens:
            del self.busy[request]
        self.take(self.coordinator.sampled(tokens))

    def ended(self) -> dict[int, str]:
        ends = [(event.request, event.reason) for event in self.events if event.reason]
        assert len(dict(ends)) == len(ends), "a request ended twice"
        return dict(ends)

    def tokens(self, request: int) -> list[int]:
        return [e.token for e in self.events if e.request == request and e.token is not None]


def make_nodes(*, max_concurrency: int | None = None, capacity: dict[str, int] | None = None) -> Nodes:
    router = Router(list(zip(PIPELINES, (2.0, 1.0, 1.0), strict=True)))
    capacity = capacity or CAPACITY
    return Nodes(Coordinator(router, kv_capacity_tokens=capacity, max_concurrency=max_concurrency), capacity)


def request(number: int, *, prompt: int = 5, output: int = 4, stop: bool = False) -> Request:
    return Request(
        number=number,
        prompt=tuple(100 + number + position for position in range(prompt)),
        max_tokens=output,
        stop_token_ids=frozenset({STOP}) if stop else frozenset(),
    )


Pick = Callable[[list[int]], int]


@given(data=st.data(), max_concurrency=st.one_of(st.none(), st.integers(1, 4)))
def test_whatever_happens_no_cache_is_over_committed_and_every_request_ends_once(
    data: st.DataObject, max_concurrency: int | None
) -> None:
    nodes = make_nodes(max_concurrency=max_concurrency)
    submitted: dict[int, Request] = {}
    aborted: set[int] = set()

    def sample_some() -> None:
        count = data.draw(st.integers(1, len(nodes.busy)))
        chosen = data.draw(st.permutations(sorted(nodes.busy)))[:count]
        nodes.sample([(number, data.draw(st.sampled_from((1, 2, STOP)))) for number in chosen])

    for _ in range(data.draw(st.integers(1, 25))):
        step = data.draw(st.sampled_from(("submit", "sample", "sample", "abort")))
        if step == "submit":
            new = [
                request(
                    len(submitted) + index,
                    prompt=data.draw(st.integers(1, 25)),
                    output=data.draw(st.integers(1, 15)),
                    stop=data.draw(st.booleans()),
                )
                for index in range(data.draw(st.integers(1, 4)))
            ]
            submitted.update({r.number: r for r in new})
            nodes.take(nodes.coordinator.submit(new))
        elif step == "sample" and nodes.busy:
            sample_some()
        elif step == "abort" and submitted:
            number = data.draw(st.sampled_from(sorted(submitted)))
            if number not in nodes.ended():
                aborted.add(number)
            nodes.take(nodes.coordinator.abort(number))
        if max_concurrency is not None:
            assert nodes.coordinator.num_in_flight <= max_concurrency
        assert nodes.coordinator.num_in_flight == len(nodes.busy)
        assert nodes.coordinator.num_in_flight + nodes.coordinator.num_waiting + len(nodes.ended()) == len(submitted)
    while nodes.busy:
        sample_some()

    ended = nodes.ended()
    assert set(ended) == set(submitted)
    assert nodes.coordinator.num_waiting == nodes.coordinator.num_in_flight == 0
    assert set(nodes.used.values()) == {0}
    assert nodes.admitted == sorted(nodes.admitted), "requests are let in as they came"
    for number, reason in ended.items():
        asked, got = submitted[number], nodes.tokens(number)
        assert (reason == "abort") == (number in aborted)
        if reason == "stop":
            assert asked.stop_token_ids == {STOP}
            assert got.index(STOP) == len(got) - 1 < asked.max_tokens
        if reason == "length":
            assert len(got) == asked.max_tokens
            assert STOP not in got[:-1] or not asked.stop_token_ids
        if number in nodes.given:
            assert nodes.given[number][: len(asked.prompt)] == list(asked.prompt)
            fed_back = nodes.given[number][len(asked.prompt) :]
            assert fed_back == got[: len(fed_back)], "a sequence goes on with its own tokens"


def test_a_request_reserves_what_it_can_become_on_all_nodes_of_its_pipeline() -> None:
    nodes = make_nodes()
    nodes.take(nodes.coordinator.submit([request(0, prompt=5, output=4)]))

    assert nodes.used == {"a": 8, "b": 8, "c": 0, "d": 0}, "the last token is never fed back"
    assert nodes.open["a"][0] == OpenRequest(0, PIPELINES[0], 8, SamplingParams())
    assert nodes.open["b"][0] == nodes.open["a"][0]


def test_a_full_pipeline_is_passed_over_for_one_with_room() -> None:
    nodes = make_nodes()
    nodes.take(nodes.coordinator.submit([request(n, prompt=25, output=6) for n in range(4)]))

    assert {node: sorted(opened) for node, opened in nodes.open.items()} == {"a": [0, 1], "b": [0], "c": [1], "d": [2]}
    assert nodes.coordinator.num_waiting == 1


def test_the_first_that_waits_is_not_overtaken_by_smaller_ones() -> None:
    nodes = make_nodes()
    nodes.take(nodes.coordinator.submit([request(n, prompt=25, output=6) for n in range(4)]))
    nodes.take(nodes.coordinator.submit([request(4, prompt=1, output=1)]))
    assert nodes.coordinator.num_waiting == 2

    nodes.sample([(1, 0)])
    assert nodes.coordinator.num_waiting == 2
    for _ in range(5):
        nodes.sample([(1, 0)])
    assert nodes.admitted == [0, 1, 2, 3, 4]


def test_the_largest_request_that_fits_is_served_and_a_larger_one_refused() -> None:
    nodes = make_nodes()
    assert nodes.coordinator.largest_request_tokens() == 50

    with pytest.raises(ValueError, match=r"26 prompt and 26 output tokens need 51 KV slots; .* holds is 50"):
        nodes.coordinator.submit([request(0), request(1, prompt=26, output=26)])
    assert nodes.coordinator.num_waiting == nodes.coordinator.num_in_flight == 0, "none of a refused list is taken"

    nodes.take(nodes.coordinator.submit([request(2, prompt=26, output=25)]))
    assert nodes.used["d"] == 50


@pytest.mark.parametrize(("prompt", "output"), [(0, 1), (1, 0), (1, -3)])
def test_requests_need_a_prompt_and_an_output(prompt: int, output: int) -> None:
    with pytest.raises(ValueError, match="prompt and an output of at least 1 token each"):
        make_nodes().coordinator.submit([request(0, prompt=prompt, output=output)])


def test_a_number_that_is_in_use_is_refused_until_its_request_has_ended() -> None:
    nodes = make_nodes(max_concurrency=1)
    nodes.take(nodes.coordinator.submit([request(0, output=1), request(1)]))
    for number in (0, 1, 2):  # in flight, waiting, and twice at once
        with pytest.raises(ValueError, match="numbers must differ"):
            nodes.coordinator.submit([request(2), request(number)])
    assert (nodes.coordinator.num_in_flight, nodes.coordinator.num_waiting) == (1, 1)

    nodes.take(nodes.coordinator.abort(1))
    nodes.sample([(0, 9)])
    nodes.coordinator.submit([request(0), request(1)])


def test_an_aborted_request_that_waits_is_dropped_at_once() -> None:
    nodes = make_nodes(max_concurrency=1)
    nodes.take(nodes.coordinator.submit([request(0), request(1), request(2)]))
    nodes.take(nodes.coordinator.abort(1))

    assert nodes.ended() == {1: "abort"}
    for _ in range(4):
        nodes.sample([(0, 5)])
    assert nodes.admitted == [0, 2]


def test_aborts_of_many_that_wait_take_no_walk_over_the_others() -> None:
    """With one walk each this does not end: 100 000 aborts beside 100 000 that wait."""
    count = 100_000
    nodes = make_nodes(max_concurrency=1)
    nodes.coordinator.submit([request(number, prompt=1, output=1) for number in range(count)])

    ended = [nodes.coordinator.abort(number).events[0].request for number in reversed(range(1, count))]

    assert ended == [*reversed(range(1, count))]
    assert (nodes.coordinator.num_waiting, nodes.coordinator.num_in_flight) == (0, 1)


def test_an_aborted_request_in_flight_holds_its_slots_until_its_token_is_back() -> None:
    nodes = make_nodes()
    nodes.take(nodes.coordinator.submit([request(0)]))
    nodes.take(nodes.coordinator.abort(0))

    assert nodes.used["a"] == 8
    assert nodes.ended() == {}
    nodes.sample([(0, 5)])
    assert nodes.used["a"] == 0
    assert nodes.ended() == {0: "abort"}
    assert nodes.tokens(0) == []


def test_stop_tokens_end_a_request_only_after_its_least_output() -> None:
    nodes = make_nodes()
    asked = Request(number=0, prompt=(1, 2, 3), max_tokens=5, stop_token_ids=frozenset({STOP, 3}), min_tokens=2)
    nodes.take(nodes.coordinator.submit([asked]))
    opened = next(opened[0] for opened in nodes.open.values() if opened)
    for _ in range(3):
        nodes.sample([(0, STOP)])

    assert (opened.stop_from, opened.stop_token_ids, opened.scored) == (5, (3, STOP), ())
    assert nodes.tokens(0) == [STOP] * 3
    assert nodes.ended() == {0: "stop"}


def test_scores_travel_with_the_event_of_their_token() -> None:
    nodes = make_nodes()
    asked = [Request(number=n, prompt=(1, 2), max_tokens=1, is_prompt_scored=n == 1) for n in range(2)]
    actions = nodes.coordinator.submit(asked)
    scores = Scores(1, TokenScore(-0.5, ()), (TokenScore(-1.0, ()),))
    opened = {o.request: o.scored for outgoing in nodes.coordinator.messages(actions).values() for o in outgoing.opens}

    events = nodes.coordinator.sampled([(0, 9), (1, 9)], [scores]).events

    assert opened == {0: (), 1: (1, 2)}
    assert [event.scores for event in events] == [None, scores]


def test_aborting_what_has_ended_or_never_was_changes_nothing() -> None:
    nodes = make_nodes()
    nodes.take(nodes.coordinator.submit([request(0, output=1)]))
    nodes.sample([(0, 5)])

    for number in (0, 99):
        assert nodes.coordinator.abort(number) == Actions()


def test_a_token_of_an_attempt_that_is_over_is_counted_and_changes_nothing() -> None:
    coordinator = make_nodes().coordinator
    assert coordinator.sampled([(3, 1)]) == Actions()
    assert coordinator.num_late == 1


def test_what_a_moment_brings_travels_in_one_message_to_each_node() -> None:
    """A token that ends one request, one that goes on, and a new arrival: one message for a and one for b."""
    router = Router([(PIPELINES[0], 1.0)])
    nodes = Nodes(Coordinator(router, kv_capacity_tokens=CAPACITY), CAPACITY)
    nodes.take(nodes.coordinator.submit([request(0, output=1), request(1, output=5)]))

    actions = nodes.coordinator.sampled([(0, 3), (1, 4)])
    actions = nodes.coordinator.submit([request(2)], onto=actions)

    messages = nodes.coordinator.messages(actions)
    assert set(messages) == {"a", "b"}
    first, second = messages["a"], messages["b"]
    assert [item.request for item in first.items] == [1, 2]
    assert first.tokens == [4, *request(2).prompt]
    assert first.closes == second.closes == [0]
    assert [opened.request for opened in first.opens] == [opened.request for opened in second.opens] == [2]
    assert second.items == []
    assert [(event.request, event.token, event.reason) for event in actions.events] == [(0, 3, "length"), (1, 4, "")]


def test_shares_of_a_closed_loop_are_the_planned_ones() -> None:
    nodes = make_nodes(capacity=dict.fromkeys(CAPACITY, 1000))
    taken: list[Pipeline] = []
    for number in range(100):
        nodes.take(nodes.coordinator.submit([request(number, output=1)]))
        taken.append(next(o.hops for opened in nodes.open.values() for o in opened.values() if o.request == number))
        nodes.sample([(number, 1)])

    assert [taken.count(hops) for hops in PIPELINES] == [50, 25, 25]
