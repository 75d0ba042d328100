"""Agents as processes of their own, and an engine on them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from profiler.model_files import ModelFiles
from reference_server.client import Agents
from reference_server.coordinator import Request, TokenEvent
from reference_server.engine import Engine, load_plan
from reference_server.keys import ClusterKey, load_key_file
from reference_server.run_log import Routing
from solver.plan import Plan

MEMORY_BYTES = 500_000_000
STEP_MS = 1_000
END_TIMEOUT_S = 20.0


class AgentProcess:
    """``python -m reference_server.agent`` on a free port of this machine; what it logs goes to a file."""

    def __init__(self, key_file: Path, log: Path, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self.log = log
        argv = [sys.executable, "-m", "reference_server.agent", "--listen", "127.0.0.1:0", "--key", str(key_file)]
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [*argv, "--memory", str(memory_bytes)], stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def address(self) -> str:
        """Waits until it listens."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the agent ended: {self.log.read_text()}"
        return str(json.loads(line)["listening"])

    def end(self) -> None:
        """End it, at once."""
        self.process.kill()
        self.process.wait(END_TIMEOUT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


class RunningAgents:
    """Agents of one cluster: node -> address, and the key that they share."""

    def __init__(self, addresses: dict[str, str], key_file: Path) -> None:
        self.addresses = addresses
        self.key_file = key_file
        self.key: ClusterKey = load_key_file(key_file)

    @contextmanager
    def engine(
        self, plan: Plan, model: Path, *, routing: Routing = "iwrr", max_concurrency: int | None = None
    ) -> Iterator[Engine]:
        """An engine that serves the plan on the agents of its nodes."""
        used = {node: self.addresses[node] for node in plan.placement}
        with Agents(used, self.key) as agents:
            agents.require_present()
            files = ModelFiles(str(model))
            yield load_plan(agents, plan, files, routing=routing, max_concurrency=max_concurrency)


class Outcome:
    """What became of requests: their tokens, the pipeline that each took, and why it ended."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.pipelines: dict[int, int] = {}
        self.reasons: dict[int, str] = {}

    def note(self, events: Sequence[TokenEvent]) -> list[Request]:
        for event in events:
            assert event.request not in self.reasons, "an event after the last one"
            if event.token is not None:
                self.tokens.setdefault(event.request, []).append(event.token)
            self.pipelines[event.request] = event.pipeline
            if event.reason:
                self.reasons[event.request] = event.reason
        return []


def run_to_end(engine: Engine, requests: Sequence[Request]) -> Outcome:
    """Submit all at once and step until each has ended."""
    outcome = Outcome()
    outcome.note(engine.submit(requests))
    step_to_end(engine, outcome, len(requests))
    return outcome


def step_to_end(engine: Engine, outcome: Outcome, num_requests: int) -> None:
    """Step until that many requests have ended."""
    while len(outcome.reasons) < num_requests:
        engine.step(STEP_MS, on_events=outcome.note)
