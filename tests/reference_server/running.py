"""Agents as processes of their own, and an engine on them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path

import msgspec

from helixbench.profiler.model.model import open_model
from helixbench.reference_server.coordinator.engine import Engine
from helixbench.reference_server.coordinator.loading import AdaptOptions, load_plan
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.keys import ClusterKey, load_key_file
from helixbench.solver.problem.plan import Plan
from helixbench.solver.scheduling.requests import Request, TokenEvent
from helixbench.solver.scheduling.work import Routing

MEMORY_BYTES = 500_000_000
STEP_MS = 1_000
END_TIMEOUT_S = 20.0
_READY_TIMEOUT_S = 60.0


class _Listening(msgspec.Struct):
    listening: str


def _forks() -> ForkServerContext:
    """Starts processes as forks of one that has imported what an agent does: seconds of CPU, paid once.

    That a command line starts an agent, too, is for the tests of testbeds and of the commands.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "helixbench.reference_server.node.agent",
            "helixbench.profiler.stage.stage",
            "transformers.models.llama.modeling_llama",
        ]
    )
    return context


def _run_agent(key_file: Path, out: Path, log: Path, memory_bytes: int, listen: str) -> None:
    from helixbench.reference_server.launch.agent import run_agent
    from helixbench.reference_server.node.agent import AgentConfig

    for path, descriptor in ((out, 1), (log, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    run_agent(AgentConfig(listen=listen, key=key_file, memory_bytes=memory_bytes, threads=1))


class AgentProcess:
    """An agent on a free port of this machine; what it logs goes to a file."""

    def __init__(
        self, key_file: Path, log: Path, *, memory_bytes: int = MEMORY_BYTES, listen: str = "127.0.0.1:0"
    ) -> None:
        self.log = log
        self._out = log.with_suffix(".out")
        self.process = _forks().Process(
            target=_run_agent, args=(key_file, self._out, log, memory_bytes, listen), daemon=True
        )
        self.process.start()

    def address(self) -> str:
        """Waits until it listens."""
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while True:
            has_ended = self.process.exitcode is not None
            text = self._out.read_text() if self._out.exists() else ""
            if text.endswith("\n"):
                return msgspec.json.decode(text, type=_Listening).listening
            said = self.log.read_text() if self.log.exists() else "nothing"
            assert not has_ended, f"the agent ended: {said}"
            assert time.monotonic() < deadline, f"the agent does not listen: {said}"
            time.sleep(0.01)

    def send_signal(self, number: signal.Signals) -> None:
        """As by ``kill``."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self) -> int | None:
        """Its exit code, once it has ended."""
        self.process.join(END_TIMEOUT_S)
        return self.process.exitcode

    def end(self) -> None:
        """End it, at once."""
        self.process.kill()
        self.process.join(END_TIMEOUT_S)
        self.process.close()


class RunningAgents:
    """Agents of one cluster: node -> address, and the key that they share."""

    def __init__(self, addresses: dict[str, str], key_file: Path) -> None:
        self.addresses = addresses
        self.key_file = key_file
        self.key: ClusterKey = load_key_file(key_file)

    @contextmanager
    def engine(
        self,
        plan: Plan,
        model: Path,
        *,
        routing: Routing = "iwrr",
        max_concurrency: int | None = None,
        options: AdaptOptions = AdaptOptions(),  # noqa: B008 - frozen
    ) -> Iterator[Engine]:
        """An engine that serves the plan on the agents of its nodes."""
        used = {node: self.addresses[node] for node in plan.placement}
        with Agents(used, self.key) as agents:
            agents.describe()
            files = open_model(str(model))
            engine = load_plan(agents, plan, files, routing=routing, max_concurrency=max_concurrency, options=options)
            try:
                yield engine
            finally:
                engine.release()


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
            if event.pipeline is not None:
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
