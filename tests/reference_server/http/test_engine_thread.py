"""The thread that runs the engine: clients take turns, and it never ends without telling those who wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixbench.reference_server.http.engine_protocol import EngineUnavailable, Load
from helixbench.reference_server.http.engine_thread import EngineThread
from helixbench.reference_server.http.fair_queue import FairQueue
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.requests import Actions, Request, TokenEvent
from helixbench.solver.scheduling.router import Router
from tests.reference_server.http.serving import until
from tests.solver.scheduling.test_router import pipeline


class OneAtATime:
    """A coordinator whose one node has room for one request, and answers each step with a token."""

    def __init__(self) -> None:
        self.agents = SimpleNamespace(addresses={"a": "host:1"}, watch=lambda _: None)
        self.coordinator = Coordinator(Router([(pipeline("a"), 1.0)]), kv_capacity_tokens={"a": 10}, max_concurrency=1)
        self.admitted: list[int] = []
        self.is_paused = True
        self.is_emulated, self.late_iterations, self.adaptation = False, 0, None

    def submit(self, requests: list[Request]) -> list[TokenEvent]:
        return self._do(self.coordinator.submit(requests))

    def abort(self, number: int) -> list[TokenEvent]:
        return self._do(self.coordinator.abort(number))

    def step(self, timeout_ms: int, *, on_events: Callable[[list[TokenEvent]], list[Request]]) -> None:
        time.sleep(0.001)
        if not self.is_paused and self.coordinator.num_in_flight:
            on_events(self._do(self.coordinator.sampled([(self.admitted[-1], 5)])))

    def _do(self, actions: Actions) -> list[TokenEvent]:
        self.admitted += [
            opened.request for outgoing in self.coordinator.messages(actions).values() for opened in outgoing.opens
        ]
        return actions.events


@contextmanager
def running(engine: Any) -> Iterator[EngineThread]:
    thread = EngineThread(engine)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop()


def request(number: int, *, prompt: int = 1, max_tokens: int = 1) -> Request:
    return Request(number=number, prompt=(1,) * prompt, max_tokens=max_tokens)


async def last_token(thread: EngineThread, asked: Request, client: object) -> int:
    return [out.token async for out in thread.generate(asked, client=client)][-1]


def test_a_thousand_prompts_of_one_client_do_not_stand_before_another_ones() -> None:
    engine = OneAtATime()
    with running(engine) as thread:

        async def ask() -> None:
            many = [asyncio.create_task(last_token(thread, request(n), "greedy")) for n in range(1000)]
            await asyncio.sleep(0)
            few = [asyncio.create_task(last_token(thread, request(n), n)) for n in (5000, 5001)]
            await asyncio.sleep(0)
            assert thread.load().num_running + thread.load().num_waiting == 1002
            engine.is_paused = False
            await asyncio.gather(*few)
            assert engine.admitted.index(5001) < 8
            assert sum(task.done() for task in many) < 500
            for task in many:
                task.cancel()
            await asyncio.gather(*many, return_exceptions=True)

        asyncio.run(ask())
        until(lambda: thread.load() == Load(num_running=0, num_waiting=0, waiting_tokens=0, kv_usage=0.0))
    assert engine.coordinator.kv_held_tokens == {"a": 0}


def test_load_counts_what_runs_and_what_waits() -> None:
    engine = OneAtATime()
    with running(engine) as thread:

        async def ask() -> None:
            tasks = [
                asyncio.create_task(last_token(thread, request(n, prompt=4, max_tokens=2), "me")) for n in range(4)
            ]
            while thread.load().num_running == 0:
                await asyncio.sleep(0.001)
            load = thread.load()
            assert (load.num_running, load.num_waiting, load.kv_usage) == (1, 3, 0.5)
            assert load.waiting_tokens in (8, 12), "one of them may stand in the coordinator's own queue"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(ask())
        engine.is_paused = False


class BrokenEngine(OneAtATime):
    """Takes requests, and breaks with an error that is nobody's but ours."""

    def step(self, timeout_ms: int, *, on_events: Any) -> None:
        if self.coordinator.num_in_flight:
            raise IndexError("a bug")


def test_a_bug_in_the_engine_fails_its_requests() -> None:
    async def ask(thread: EngineThread) -> None:
        asked = [last_token(thread, request(n), "me") for n in range(3)]
        outcomes = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), timeout=10)
        assert [type(outcome) for outcome in outcomes] == [EngineUnavailable] * 3
        assert "a bug" in str(outcomes[0])
        with pytest.raises(EngineUnavailable, match="a bug"):
            await asyncio.wait_for(last_token(thread, request(9), "me"), timeout=10)

    with running(BrokenEngine()) as thread:
        asyncio.run(ask(thread))
        assert not thread.health().is_ready
        assert "a bug" in str(thread.failure)


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    removed=st.sets(st.integers(0, 29), max_size=10),
)
def test_clients_take_turns_each_in_its_own_order(sizes: list[int], removed: set[int]) -> None:
    queue = FairQueue()
    client_of = {}
    for client, size in enumerate(sizes):
        for _ in range(size):
            number = len(client_of)
            client_of[number] = client
            queue.add(request(number, prompt=number + 1), client)
    gone = {number for number in removed if queue.remove(number)}
    assert gone == removed & set(client_of)
    assert not any(queue.remove(number) for number in removed)
    left = [number for number in client_of if number not in gone]
    assert len(queue) == len(left)
    assert queue.num_tokens == sum(number + 1 for number in left)

    taken = []
    while (one := queue.take()) is not None:
        taken.append(one.number)

    assert sorted(taken) == left
    assert (len(queue), queue.num_tokens) == (0, 0)
    for client in range(len(sizes)):
        own = [number for number in taken if client_of[number] == client]
        assert own == sorted(own)
        for other in range(len(sizes)):
            if own and other != client:
                before = [client_of[number] for number in taken[: taken.index(own[-1])]]
                assert before.count(other) <= len(own), "nobody gets more turns than this one by its last"


def test_streams_that_are_cut_off_are_told_why() -> None:
    """Those that run and those that wait; their slots are free afterwards."""
    engine = OneAtATime()
    with running(engine) as thread:

        async def ask() -> None:
            tasks = [asyncio.create_task(last_token(thread, request(n, max_tokens=2), "me")) for n in range(3)]
            while thread.load().num_running == 0:
                await asyncio.sleep(0.001)
            thread.end_streams("shutting down")
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert [str(error) for error in ended] == ["shutting down"] * 3
            assert {type(error) for error in ended} == {EngineUnavailable}

        asyncio.run(ask())
        engine.is_paused = False
        until(lambda: thread.load() == Load(num_running=0, num_waiting=0, waiting_tokens=0, kv_usage=0.0))
    assert engine.coordinator.kv_held_tokens == {"a": 0}
