from __future__ import annotations

import random
from collections import deque

import pytest

from helixbench.solver.problem.plan import Hop, LayerRange
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.dispatch import Outgoing
from helixbench.solver.scheduling.recover import Paths
from helixbench.solver.scheduling.requests import Actions, Request
from helixbench.solver.scheduling.router import Router
from helixbench.solver.scheduling.work import SamplingParams, attempt_of, number_of

PLACEMENT = {"a": LayerRange(0, 2), "a2": LayerRange(0, 2), "b": LayerRange(2, 4), "b2": LayerRange(1, 4)}
A_B = (Hop("a", 0, 2), Hop("b", 2, 4))
A2_B2 = (Hop("a2", 0, 2), Hop("b2", 2, 4))


def make(*, capacity: int = 100) -> Coordinator:
    return Coordinator(
        Router([(A_B, 1.0), (A2_B2, 1.0)]),
        kv_capacity_tokens=dict.fromkeys(PLACEMENT, capacity),
        paths=Paths(PLACEMENT, 4),
    )


def ask(number: int, *, prompt: int = 3, output: int = 5) -> Request:
    return Request(number=number, prompt=tuple(range(1, prompt + 1)), max_tokens=output)


def sends(coordinator: Coordinator, actions: Actions) -> dict[str, Outgoing]:
    return coordinator.messages(actions)


def test_a_lost_last_node_is_replayed_from_what_the_node_before_it_kept() -> None:
    coordinator = make()
    coordinator.submit([ask(0)])
    coordinator.sampled([(0, 11)])
    coordinator.sampled([(0, 12)])

    actions = coordinator.observe(lost={"b"})
    messages = sends(coordinator, actions)

    again = attempt_of(0, 1)
    assert set(messages) == {"a", "b2"}
    (kept,) = messages["a"].opens
    assert (kept.request, kept.adopts, kept.replays, kept.deliver_from) == (again, 0, 4, 0)
    assert kept.hops == (Hop("a", 0, 2), Hop("b2", 2, 4))
    (stand_in,) = messages["b2"].opens
    assert (stand_in.adopts, stand_in.replays) == (None, 0)
    # the newest token alone enters again, behind what is replayed
    (item,) = messages["a"].items
    assert (item.request, item.past, item.num_tokens, item.is_decode) == (again, 4, 1, False)
    assert messages["a"].tokens == [12]
    assert coordinator.kv_held_tokens == {"a": 7, "a2": 0, "b2": 7}


def test_a_lost_first_node_gets_all_tokens_from_here_and_the_rest_keeps_its_cache() -> None:
    coordinator = make()
    coordinator.submit([ask(0)])
    coordinator.sampled([(0, 11)])

    messages = sends(coordinator, coordinator.observe(lost={"a"}))

    (stand_in,), (kept,) = messages["a2"].opens, messages["b"].opens
    assert (stand_in.adopts, stand_in.deliver_from) == (None, 3)
    assert kept.adopts == 0
    (item,) = messages["a2"].items
    assert (item.past, item.num_tokens) == (0, 4)
    assert messages["a2"].tokens == [1, 2, 3, 11]


def test_what_was_not_kept_is_prefilled_again() -> None:
    coordinator = make()
    coordinator.submit([ask(0)])
    coordinator.sampled([(0, 11)])
    coordinator.observe(lost={"b"})

    messages = sends(coordinator, coordinator.cannot_replay(attempt_of(0, 1), "a"))

    entered = [node for node, message in messages.items() if message.items]
    assert len(entered) == 1
    (item,) = messages[entered[0]].items
    assert (item.request, item.past, item.num_tokens) == (attempt_of(0, 2), 0, 4)
    assert all(opened.adopts is None for message in messages.values() for opened in message.opens)
    # its earlier attempt is closed wherever it was open
    assert {node: message.closes for node, message in messages.items() if message.closes} == {
        node: [attempt_of(0, 1)] for node in ("a", "b2")
    }


def test_a_prompt_that_had_given_no_token_begins_again() -> None:
    coordinator = make()
    coordinator.submit([ask(0)])

    messages = sends(coordinator, coordinator.observe(lost={"b"}))

    assert all(opened.adopts is None for message in messages.values() for opened in message.opens)
    items = [item for message in messages.values() for item in message.items]
    assert [(item.past, item.num_tokens) for item in items] == [(0, 3)]


def test_late_tokens_of_the_old_attempt_are_dropped() -> None:
    coordinator = make()
    coordinator.submit([ask(0)])
    coordinator.sampled([(0, 11)])
    coordinator.observe(lost={"b"})

    assert coordinator.sampled([(0, 99)]).events == []
    (event,) = coordinator.sampled([(attempt_of(0, 1), 12)]).events
    assert (event.request, event.token) == (0, 12)
    assert coordinator.num_late == 1


def test_without_room_a_request_waits_in_front_of_new_ones_and_holds_nothing() -> None:
    coordinator = make(capacity=7)
    coordinator.submit([ask(0), ask(1)])
    coordinator.sampled([(0, 11), (1, 21)])

    messages = sends(coordinator, coordinator.observe(lost={"b"}))
    coordinator.submit([ask(2)])

    assert (coordinator.num_recovering, coordinator.num_in_flight, coordinator.num_waiting) == (1, 1, 1)
    assert messages["a"].closes == [0]
    assert coordinator.kv_held_tokens["a"] == 0
    for token in range(22, 26):
        actions = coordinator.sampled([(1, token)])
    # request 1 ended: 0 goes on before 2 begins
    assert [number_of(moved.state.attempt) for moved in actions.moved] == [0]
    assert (coordinator.num_recovering, coordinator.num_in_flight, coordinator.num_waiting) == (0, 1, 1)


def test_without_any_pipeline_all_wait_and_go_on_when_a_node_is_back() -> None:
    coordinator = make()
    coordinator.submit([ask(0)])
    coordinator.sampled([(0, 11)])
    coordinator.observe(lost={"b", "b2"})

    assert not coordinator.is_covered
    assert coordinator.num_recovering == 1
    messages = sends(coordinator, coordinator.observe(lost={"b"}))
    assert coordinator.is_covered
    assert coordinator.num_recovering == 0
    assert sum(len(message.items) for message in messages.values()) == 1


def test_giving_up_ends_all_that_wait_with_an_error() -> None:
    coordinator = make()
    coordinator.submit([ask(0)])
    coordinator.observe(lost=set(PLACEMENT))
    coordinator.submit([ask(1)])

    events = coordinator.give_up().events

    assert {(event.request, event.reason) for event in events} == {(0, "error"), (1, "error")}
    assert (coordinator.num_recovering, coordinator.num_waiting) == (0, 0)


def test_nodes_that_are_passed_over_keep_what_they_have() -> None:
    coordinator = make()
    coordinator.submit([ask(0)])

    assert coordinator.observe(lost=(), passed_over={"a", "b"}).moved == []
    (state,) = coordinator.submit([ask(1)]).admitted
    (other,) = coordinator.submit([ask(2)]).admitted
    assert state.pipeline == other.pipeline


def test_a_link_that_is_down_moves_requests_to_another_one() -> None:
    coordinator = make()
    coordinator.submit([ask(0)])
    coordinator.sampled([(0, 11)])

    (moved,) = coordinator.observe(lost=(), links_down={("a", "b")}).moved

    assert moved.recovery is not None
    assert ("a", "b") not in zip(
        [hop.node for hop in moved.recovery.hops], [hop.node for hop in moved.recovery.hops[1:]], strict=False
    )


def test_a_request_that_a_node_could_not_run_ends_with_an_error() -> None:
    coordinator = make()
    coordinator.submit([ask(0), ask(1)])

    actions = coordinator.failed([0, 77], "no memory")

    assert [(event.request, event.reason, event.detail) for event in actions.events] == [(0, "error", "no memory")]
    assert coordinator.num_in_flight == 1


def test_every_attempt_samples_with_the_requests_own_seed() -> None:
    coordinator = make()
    request = Request(number=5, prompt=(1,), max_tokens=3, sampling=SamplingParams(temperature=1.0))
    first = sends(coordinator, coordinator.submit([request]))
    coordinator.sampled([(5, 11)])
    again = sends(coordinator, coordinator.observe(lost={"b"}))

    seeds = {o.sampling.seed for messages in (first, again) for m in messages.values() for o in m.opens}
    assert seeds == {5}


class Toy:
    """Nodes that keep, for each attempt, which positions of each layer they have; work travels in any order.

    A token is ``hash(tokens so far)``: it is right only if every layer had every earlier position.
    """

    def __init__(self, coordinator: Coordinator, rng: random.Random) -> None:
        self.coordinator, self.rng = coordinator, rng
        self.caches: dict[str, dict[int, list[int]]] = {node: {} for node in PLACEMENT}  # attempt -> tokens cached
        self.opened: dict[str, dict[int, object]] = {node: {} for node in PLACEMENT}
        self.inbox: dict[tuple[str, str], deque[tuple[int, int, list[int], bool]]] = {}  # (from, to) -> in order
        self.lost: set[str] = set()
        self.got: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.dropped = 0

    def act(self, actions: Actions) -> None:
        for event in actions.events:
            if event.token is not None:
                self.got.setdefault(event.request, []).append(event.token)
            if event.reason:
                assert event.request not in self.ended, "a request ended twice"
                self.ended[event.request] = event.reason
        for node, message in self.coordinator.messages(actions).items():
            assert node not in self.lost
            for attempt in message.closes:
                del self.opened[node][attempt], self.caches[node][attempt]
            for opened in message.opens:
                if opened.adopts is None:
                    self.caches[node][opened.request] = []
                else:
                    del self.opened[node][opened.adopts]
                    self.caches[node][opened.request] = self.caches[node].pop(opened.adopts)
                self.opened[node][opened.request] = opened
                if opened.replays:
                    place = [hop.node for hop in opened.hops].index(node)
                    replayed = self.caches[node][opened.request][: opened.replays]
                    assert len(replayed) == opened.replays
                    self.send(node, opened.hops[place + 1].node, opened.request, 0, replayed, sample=False)
            start = 0
            for item in message.items:
                tokens = message.tokens[start : start + item.num_tokens]
                start += item.num_tokens
                self.send("", node, item.request, item.past, tokens, sample=item.sample)

    def send(self, src: str, dst: str, attempt: int, past: int, tokens: list[int], *, sample: bool) -> None:
        self.inbox.setdefault((src, dst), deque()).append((attempt, past, tokens, sample))

    def step(self) -> None:
        """One message is delivered, of a random link."""
        links = [link for link, queue in self.inbox.items() if queue]
        src, node = self.rng.choice(links)
        attempt, past, tokens, sample = self.inbox[src, node].popleft()
        opened = self.opened[node].get(attempt)
        if node in self.lost or opened is None:
            self.dropped += 1
            return
        cache = self.caches[node][attempt]
        assert past <= len(cache), f"{node} was given position {past} and has {len(cache)}"
        del cache[past:]
        cache += tokens
        hops = [hop.node for hop in opened.hops]  # type: ignore[attr-defined]
        place = hops.index(node)
        if place + 1 == len(hops):
            if sample:
                self.act(self.coordinator.sampled([(attempt, next_token(cache))]))
            return
        skip = max(0, opened.deliver_from - past)  # type: ignore[attr-defined]
        if tokens[skip:]:
            self.send(node, hops[place + 1], attempt, past + skip, tokens[skip:], sample=sample)

    def lose(self, node: str) -> None:
        self.lost.add(node)
        self.caches[node], self.opened[node] = {}, {}
        self.act(self.coordinator.observe(lost=self.lost))

    def bring_back(self, node: str) -> None:
        self.lost.discard(node)
        self.act(self.coordinator.observe(lost=self.lost))


def next_token(tokens: list[int]) -> int:
    return hash(tuple(tokens)) % 1000 + 1


def reference(request: Request) -> list[int]:
    tokens = list(request.prompt)
    for _ in range(request.max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(request.prompt) :]


@pytest.mark.parametrize("seed", range(100))
def test_whatever_is_lost_every_request_gets_the_tokens_of_an_undisturbed_run(seed: int) -> None:
    rng = random.Random(seed)
    coordinator = make(capacity=rng.choice([12, 30, 100]))
    toy = Toy(coordinator, rng)
    requests = [ask(n, prompt=rng.randint(1, 6), output=rng.randint(1, 7)) for n in range(8)]
    waiting = list(requests)
    for _ in range(10_000):
        chance = rng.random()
        alive = set(PLACEMENT) - toy.lost
        if waiting and chance < 0.1:
            toy.act(coordinator.submit([waiting.pop()]))
        elif chance < 0.14 and alive:
            toy.lose(rng.choice(sorted(alive)))
        elif toy.lost and chance < 0.24:
            toy.bring_back(rng.choice(sorted(toy.lost)))
        elif any(toy.inbox.values()):
            toy.step()
        elif not waiting and not coordinator.num_in_flight + coordinator.num_recovering + coordinator.num_waiting:
            break
    for node in sorted(toy.lost):
        toy.bring_back(node)
    while any(toy.inbox.values()):
        toy.step()

    assert toy.ended == {request.number: "length" for request in requests}
    assert toy.got == {request.number: reference(request) for request in requests}
    assert coordinator.kv_held_tokens == dict.fromkeys(PLACEMENT, 0)
    assert all(not opened for opened in toy.opened.values())
