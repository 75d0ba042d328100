"""``helixbench serve``, from the command to the answers that the official client reads, and the engine's thread."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import openai
import pytest

from helixbench.records import load_record, save_record
from helixbench.reference_server.coordinator.engine import Engine
from helixbench.reference_server.coordinator.options import AdaptOptions
from helixbench.reference_server.http.engine_protocol import EngineUnavailable, RequestRefused, TokenOut
from helixbench.reference_server.http.engine_thread import EngineThread
from helixbench.reference_server.jobs.job import Serving
from helixbench.reference_server.testbed import run_state
from helixbench.solver.scheduling.requests import Request
from tests.conftest import GreedyOf, ModelDir
from tests.greedy import Greedy
from tests.reference_server.coordinator.test_engine import ask_counters
from tests.reference_server.plans import ONE_NODE, THREE_IN_A_ROW, make_plan
from tests.reference_server.running import AgentProcess, RunningAgents
from tests.reference_server.testbed.beds import left_behind, needs_root

PRESET = "test-llama"
NUM_REQUESTS = 8
NUMBERS = itertools.count()
ANSWER_S = 120.0
TESTBED = """
[[node]]
name = "a"
memory = "200MB"
[[node]]
name = "b"
memory = "200MB"
"""
PLAN = ({"a": (0, 3), "b": (2, 6)}, [(["a", "b"], 1.0)])


class Served(NamedTuple):
    process: subprocess.Popen[bytes]
    url: str
    run_id: str


@pytest.fixture(scope="module")
def served(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The command, on a testbed of two nodes that it starts itself."""
    folder = tmp_path_factory.mktemp("serve")
    save_record(folder / "plan.json", make_plan(model_dir(PRESET), *PLAN))
    (folder / "testbed.toml").write_text(TESTBED)
    argv = [sys.executable, "-m", "helixbench", "serve", str(folder / "plan.json"), "--model", str(model_dir(PRESET))]
    ready, log = folder / "ready.json", folder / "server.log"
    argv += ["--testbed", str(folder / "testbed.toml"), "--port", "0", "--ready-file", str(ready)]
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stderr=output, stdout=subprocess.DEVNULL, cwd=folder)
    try:
        while not ready.exists():
            assert process.poll() is None, f"the server ended: {log.read_text()}"
            time.sleep(0.05)
        serving = load_record(ready, Serving)
        assert serving.model == PRESET
        assert f"on {serving.url} " in " ".join(log.read_text().split())
        yield Served(process, serving.url, run_id_of(process.pid))
    finally:
        process.terminate()
        process.communicate(timeout=60)


def run_id_of(owner_pid: int) -> str:
    """The run that a process owns, by its state file."""
    files = run_state.state_folder().glob("*.json")
    states = [msgspec.json.decode(path.read_bytes(), type=run_state.RunState) for path in files]
    (run_id,) = [state.run_id for state in states if state.owner_pid == owner_pid]
    return run_id


@pytest.fixture(scope="module")
def references(greedy_of: GreedyOf) -> tuple[Greedy, ...]:
    return greedy_of(PRESET)[:NUM_REQUESTS]


def decoded(tokens: tuple[int, ...]) -> str:
    return bytes(tokens).decode()  # one token a byte, all of them printable


async def complete(client: openai.AsyncOpenAI, reference: Greedy, *, stream: bool) -> tuple[str, str | None]:
    """Text and finish reason."""
    options: dict[str, Any] = {
        "model": PRESET,
        "prompt": list(reference.prompt),
        "max_tokens": len(reference.output),
        "temperature": 0,
    }
    if not stream:
        answer = await client.completions.create(**options)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(reference.output)
        return answer.choices[0].text, answer.choices[0].finish_reason
    text, reason = "", None
    async for event in await client.completions.create(**options, stream=True):
        text += event.choices[0].text
        reason = event.choices[0].finish_reason or reason
    return text, reason


def test_the_official_client_gets_what_generate_yields(served: Served, references: tuple[Greedy, ...]) -> None:
    async def all_at_once() -> list[tuple[str, str | None]]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_S
        ) as client:
            return await asyncio.gather(
                *(complete(client, r, stream=number % 2 == 0) for number, r in enumerate(references))
            )

    answers = asyncio.run(all_at_once())

    assert answers == [(decoded(reference.output), "length") for reference in references]
    assert len({text for text, _ in answers}) > NUM_REQUESTS // 2


def test_health_names_the_nodes(served: Served) -> None:
    with urllib.request.urlopen(f"{served.url}/health", timeout=ANSWER_S) as answer:
        assert answer.status == 200
        assert {node["state"] for node in json.load(answer)["nodes"].values()} <= {"idle", "progressing"}


def test_a_request_that_fits_nowhere_is_refused(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_S)
    with client, pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=PRESET, prompt=[40], max_tokens=100_000)


@pytest.mark.root
@needs_root
def test_nodes_are_in_namespaces_of_their_own(served: Served) -> None:
    behind = left_behind(served.run_id)
    assert len([path for path in behind if "netns" in path]) >= 3


def test_sigterm_ends_all_and_leaves_nothing(served: Served) -> None:
    """The last test of this server: 143 says that SIGTERM ended it."""
    processes = [path for path in left_behind(served.run_id) if path.startswith("/proc")]
    assert len(processes) >= 3, "two agents and the driver"

    served.process.send_signal(signal.SIGTERM)
    code = served.process.wait(60)

    assert code == 143
    assert left_behind(served.run_id) == []


# The engine's thread


async def tokens_of(engine: EngineThread, reference: Greedy, *, stop_after: int | None = None) -> list[int]:
    """Tokens of one stream, closed early where asked to."""
    tokens: list[int] = []
    request = Request(number=next(NUMBERS), prompt=reference.prompt, max_tokens=len(reference.output))
    stream = engine.generate(request, client=request.number)
    async for out in stream:
        assert isinstance(out, TokenOut)
        tokens.append(out.token)
        if len(tokens) == stop_after:
            await stream.aclose()
            break
    return tokens


class Running:
    """An engine's thread, stopped at the end."""

    def __init__(self, engine: Engine) -> None:
        self.thread = EngineThread(engine)

    def __enter__(self) -> EngineThread:
        self.thread.start()
        return self.thread

    def __exit__(self, *_: object) -> None:
        self.thread.stop()


def test_streams_side_by_side_get_their_own_tokens(
    running: RunningAgents, model_dir: ModelDir, references: tuple[Greedy, ...]
) -> None:
    model = model_dir(PRESET)
    with running.engine(make_plan(model, *THREE_IN_A_ROW), model) as engine, Running(engine) as thread:

        async def all_at_once() -> list[list[int]]:
            return await asyncio.gather(*(tokens_of(thread, reference) for reference in references))

        answers = asyncio.run(all_at_once())
        assert thread.health().is_ready
        assert {node.state for node in thread.health().nodes.values()} <= {"idle", "progressing"}

    assert [tuple(tokens) for tokens in answers] == [reference.output for reference in references]


def test_a_closed_stream_ends_its_request_and_frees_its_slots(
    running: RunningAgents, model_dir: ModelDir, references: tuple[Greedy, ...]
) -> None:
    model = model_dir(PRESET)
    reference = max(references, key=lambda reference: len(reference.output))
    # Room for one endless request: another is let in only when its slots are free.
    endless = Greedy(reference.prompt, (0,) * 3000)
    plan = make_plan(model, *ONE_NODE, kv_capacity_tokens=len(endless.prompt) + 3000)
    with running.engine(plan, model) as engine:
        with Running(engine) as thread:

            async def one_after_the_other() -> tuple[list[int], list[int]]:
                return await tokens_of(thread, endless, stop_after=2), await tokens_of(thread, reference)

            cut, whole = asyncio.run(one_after_the_other())
        assert engine.coordinator.num_in_flight == 0
        ran = ask_counters(engine)["n0"]
        assert ask_counters(engine)["n0"].kv_peak_tokens == 0

    assert tuple(cut) == reference.output[:2]
    assert tuple(whole) == reference.output
    assert ran.decode_tokens < 500, "the closed stream's request went on"


def test_a_request_too_large_is_refused_and_others_are_served(
    running: RunningAgents, model_dir: ModelDir, references: tuple[Greedy, ...]
) -> None:
    model = model_dir(PRESET)
    with (
        running.engine(make_plan(model, *ONE_NODE, kv_capacity_tokens=120), model) as engine,
        Running(engine) as thread,
    ):

        async def ask() -> list[int]:
            with pytest.raises(RequestRefused, match="the largest that a pipeline holds is 120"):
                await tokens_of(thread, Greedy((40,) * 100, (0,) * 22))
            return await tokens_of(thread, references[0])

        assert tuple(asyncio.run(ask())) == references[0].output


def test_when_no_nodes_are_left_streams_end_and_health_says_why(
    running: RunningAgents, model_dir: ModelDir, references: tuple[Greedy, ...], tmp_path: Path
) -> None:
    """Until an agent is there again: then requests are served as before."""
    model = model_dir(PRESET)
    doomed = AgentProcess(running.key_file, tmp_path / "doomed.log")
    agents = RunningAgents(running.addresses | {"n1": doomed.address()}, running.key_file)
    plan, options = make_plan(model, *THREE_IN_A_ROW), AdaptOptions(outage_s=0.5)
    try:
        with agents.engine(plan, model, options=options) as engine, Running(engine) as thread:

            async def ask() -> None:
                request = Request(number=next(NUMBERS), prompt=(40, 41), max_tokens=1000)
                stream = thread.generate(request, client="me")
                await anext(stream)
                doomed.process.kill()
                with pytest.raises(EngineUnavailable, match="those that are left cannot finish this request"):
                    [out async for out in stream]

            asyncio.run(ask())
            health = thread.health()
            assert not health.is_ready
            assert health.detail == "the nodes that take requests do not cover the model; without n1"
            assert health.nodes["n1"].state == "lost"

            doomed.end()
            doomed = AgentProcess(running.key_file, tmp_path / "again.log", listen=agents.addresses["n1"])
            deadline = time.monotonic() + 60
            while not thread.health().is_ready:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert tuple(asyncio.run(tokens_of(thread, references[0]))) == references[0].output
            assert thread.failure is None
    finally:
        doomed.end()
