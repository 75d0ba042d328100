"""The thread that runs the engine never ends without telling those who wait."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from helixbench.reference_server.http.engine_protocol import EngineUnavailable
from helixbench.reference_server.http.engine_thread import EngineThread
from helixbench.solver.scheduling.work import SamplingParams


class BrokenEngine:
    """Takes requests, and breaks with an error that is nobody's but ours."""

    def __init__(self) -> None:
        self.agents = SimpleNamespace(addresses={"a": "host:1"}, watch=lambda _: None)
        self.has_request = False

    def submit(self, requests: list[Any]) -> list[Any]:
        self.has_request = True
        return []

    def step(self, timeout_ms: int, *, on_events: Any) -> None:
        if self.has_request:
            raise IndexError("a bug")


def test_a_bug_in_the_engine_fails_its_requests() -> None:
    thread = EngineThread(BrokenEngine())  # type: ignore[arg-type]

    async def ask() -> None:
        stream = thread.generate([1], max_tokens=1, sampling=SamplingParams(), stop_token_ids=frozenset())
        await asyncio.wait_for(anext(stream), timeout=10)

    thread.start()
    try:
        with pytest.raises(EngineUnavailable, match="a bug"):
            asyncio.run(ask())
        assert not thread.health().is_ready
        assert "a bug" in str(thread.failure)
    finally:
        thread.stop()
