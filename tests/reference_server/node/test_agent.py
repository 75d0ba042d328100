"""A real agent, spoken to over its socket: what it refuses, and that it goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from helixbench.errors import InputError
from helixbench.profiler.model.checkpoint import Checkpoint
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage.stage import Stage
from helixbench.reference_server.node.agent import Agent, AgentConfig
from helixbench.reference_server.wire.messages import (
    MAX_HEADER_BYTES,
    Answer,
    Counters,
    Describe,
    Description,
    Done,
    Echo,
    Echoed,
    Failed,
    Load,
    Loaded,
    ReadCounters,
    RequestsFailed,
    Sampled,
    Shutdown,
    Work,
    decode_answer,
    encode,
)
from helixbench.reference_server.wire.transport import Transport
from helixbench.solver.problem.plan import Hop
from helixbench.solver.scheduling.work import OpenRequest, SamplingParams, WorkItem
from tests.conftest import GreedyOf, ModelDir
from tests.reference_server.running import MEMORY_BYTES, AgentProcess, RunningAgents

ANSWER_MS = 60_000


class Talk:
    """One connection to an agent, over which anything can be said."""

    def __init__(self, transport: Transport, address: str) -> None:
        self._socket = transport.connect(address)

    def say(self, *frames: bytes) -> None:
        self._socket.send_multipart(list(frames))

    def hear(self) -> Answer:
        assert self._socket.poll(ANSWER_MS), "the agent is silent"
        return decode_answer(self._socket.recv_multipart()[0])

    def ask(self, message: Any, payload: bytes | None = None) -> Answer:
        self.say(encode(message), *([] if payload is None else [payload]))
        return self.hear()


@contextmanager
def talking(running: RunningAgents, node: str = "n0") -> Iterator[Talk]:
    transport = Transport(running.key)
    try:
        yield Talk(transport, running.addresses[node])
    finally:
        transport.close()


@pytest.fixture
def talk(running: RunningAgents) -> Iterator[Talk]:
    with talking(running) as made:
        yield made


def load_of(model: Path, **changes: Any) -> Load:
    files = ModelFiles(str(model))
    command = Load(
        model=str(model),
        model_digest=files.digest(),
        dtype="float32",
        node="n0",
        start=0,
        end=6,
        kv_capacity_tokens=100,
        max_batch_tokens=8,
        max_decode_batch=None,
        peers={},
    )
    return msgspec.structs.replace(command, **changes)


def failed(answer: Answer) -> Failed:
    assert isinstance(answer, Failed), answer
    return answer


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([b"\x00garbage"], "is not understood"),
        ([b""], "is not understood"),
        ([b"\x82\xa4type\xa4load\xa5model\xa2\xff\xfe"], "is not understood"),
        ([msgspec.msgpack.encode({"type": "format-disk"})], "Invalid value 'format-disk'"),
        ([encode(Done())], "Invalid value 'done'"),
        ([bytes(MAX_HEADER_BYTES + 1)], "header of 16777217 bytes"),
        ([encode(Describe()), b"", b""], "a message of 4 frames was received; at most 3"),
        ([encode(Echo(1, 1 << 25))], "an echo of 33554432 bytes was asked for"),
        ([encode(Echo(1, -1))], "an echo of -1 bytes was asked for"),
    ],
    ids=["garbage", "empty", "utf-8", "unknown", "an answer", "oversized", "frames", "large echo", "negative echo"],
)
def test_what_is_not_understood_is_answered_and_the_agent_goes_on(
    talk: Talk, frames: list[bytes], message: str
) -> None:
    talk.say(*frames)
    answer = failed(talk.hear())

    assert message in answer.message
    assert answer.exit_code == 3
    assert isinstance(talk.ask(Describe()), Description)


def test_an_agent_says_what_it_is(talk: Talk) -> None:
    described = talk.ask(Describe())

    assert isinstance(described, Description)
    assert described.device.kind == "cpu"
    assert described.device.memory_bytes == MEMORY_BYTES
    assert {"torch", "transformers"} <= set(described.versions)


def test_an_echo_brings_back_as_much_as_was_asked_for(talk: Talk) -> None:
    assert talk.ask(Echo(4), bytes(1000)) == Echoed(4, 1000)
    talk.say(encode(Echo(5, 300)))
    assert talk._socket.recv_multipart() == [encode(Echoed(5, 0)), bytes(300)]


def test_a_load_that_cannot_be_leaves_nothing_loaded(talk: Talk, model_dir: ModelDir, tmp_path: Path) -> None:
    good = load_of(model_dir("test-llama"))
    assert isinstance(talk.ask(good), Loaded)
    changed = tmp_path / "changed"
    shutil.copytree(model_dir("test-llama"), changed)
    (changed / "config.json").write_text((changed / "config.json").read_text() + " ")
    broken = tmp_path / "broken"
    shutil.copytree(model_dir("test-llama"), broken)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])

    refused = {
        "its files on this node differ": {"model": str(changed)},
        "no such directory": {"model": "/no/such/model"},
        "not a complete safetensors file": {"model": str(broken)},
        r"layer range [4,7): the model has layers [0,6)": {"start": 4, "end": 7},
        "layer range [3,3)": {"start": 3, "end": 3},
        "need auto or one of float32": {"dtype": "int8"},
        "kv_capacity_tokens, max_batch_tokens, max_decode_batch: need >= 1, got 0, 8, None": {"kv_capacity_tokens": 0},
        "need >= 1, got 100, 0, None": {"max_batch_tokens": 0},
        "need >= 1, got 100, 8, 0": {"max_decode_batch": 0},
        "not an address of the form HOST:PORT": {"peers": {"n1": "nowhere"}},
    }
    for message, change in refused.items():
        answer = failed(talk.ask(msgspec.structs.replace(good, **change)))
        assert message in answer.message
        assert answer.exit_code == 2
        assert "no layer range is loaded" in failed(talk.ask(ReadCounters())).message
    assert isinstance(talk.ask(good), Loaded)


def test_kv_caches_fit_up_to_the_last_token_and_not_beyond(talk: Talk, model_dir: ModelDir) -> None:
    model = model_dir("test-llama")
    layers = [(0, 6), (0, 2), (2, 4), (4, 6)]
    kv_bytes = 2 * 2 * 16 * 4  # key and value, 2 KV heads, head dimension 16, float32
    for start, end in layers:
        loaded = talk.ask(load_of(model, start=start, end=end))
        assert isinstance(loaded, Loaded)
        fits = (MEMORY_BYTES - loaded.weight_bytes) // (kv_bytes * (end - start))
        answer = failed(talk.ask(load_of(model, start=start, end=end, kv_capacity_tokens=fits + 1)))
        assert f"leave room for {fits} KV tokens of the {fits + 1} needed" in answer.message
        assert answer.exit_code == 2


@pytest.fixture
def small_agent(running: RunningAgents) -> Iterator[Agent]:
    """An agent of this process, that nobody runs."""
    agent = Agent(AgentConfig(listen="127.0.0.1:0", key=running.key_file, memory_bytes=1e5))
    try:
        yield agent
    finally:
        agent.close()


def test_memory_that_runs_out_in_an_iteration_is_told_to_the_coordinator_and_the_agent_goes_on(
    running: RunningAgents, small_agent: Agent, model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(_stage: Stage, _items: object) -> None:
        raise torch.OutOfMemoryError("2 GiB wanted")

    monkeypatch.setattr(Stage, "forward", forward)
    small_agent.device = msgspec.structs.replace(small_agent.device, memory_bytes=1e9)
    opened = OpenRequest(1, (Hop("n0", 0, 6),), 4, SamplingParams())
    work = Work(items=(WorkItem(1, 0, 3, sample=True, is_decode=False),), opens=(opened,), dtype="int32")
    transport = Transport(running.key)
    serving = threading.Thread(target=small_agent.serve)
    serving.start()
    try:
        talk = Talk(transport, small_agent.address)
        assert isinstance(talk.ask(load_of(model_dir("test-llama"))), Loaded)
        answer = talk.ask(work, np.int32([1, 2, 3]).tobytes())
        assert isinstance(answer, RequestsFailed)
        assert answer.attempts == (1,)
        assert "an iteration of 3 tokens: no memory is left on the device" in answer.message
        assert isinstance(talk.ask(Describe()), Description)
        assert isinstance(talk.ask(Shutdown()), Done)
    finally:
        small_agent.stop()
        serving.join(ANSWER_MS / 1000)
        transport.close()


def test_memory_that_does_not_fit_is_refused_before_weights_are_read(
    small_agent: Agent, model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(Checkpoint, "load", lambda _checkpoint, names, **_: read.extend(names))

    with pytest.raises(InputError, match=r"layers \[0,6\) take 1 MB of 0 MB and leave room for 0 KV tokens of the 100"):
        small_agent.load(load_of(model_dir("test-llama")))
    assert not read


def test_a_full_device_is_an_input_error(
    small_agent: Agent, model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    monkeypatch.setattr("helixbench.profiler.stage.stage.Stage", full)
    command = load_of(model_dir("test-llama"), start=2, end=3, kv_capacity_tokens=1)
    small_agent.device = msgspec.structs.replace(small_agent.device, memory_bytes=1e9)
    with pytest.raises(InputError, match=r"layers \[2,3\) with 1 KV tokens: no memory is left .* 1 GiB"):
        small_agent.load(command)


def test_work_before_a_load_is_refused(talk: Talk, model_dir: ModelDir) -> None:
    failed(talk.ask(load_of(model_dir("test-llama"), end=9)))  # drops what other tests have loaded

    item = WorkItem(1, 0, 1, sample=True, is_decode=False)
    assert "work came before a layer range was loaded" in failed(talk.ask(Work(items=(item,)), bytes(4))).message
    assert "nothing to count" in failed(talk.ask(ReadCounters())).message
    assert isinstance(talk.ask(Describe()), Description)


def test_bad_work_is_refused_between_good_work(talk: Talk, model_dir: ModelDir, greedy_of: GreedyOf) -> None:
    reference = next(r for r in greedy_of("test-llama") if len(r.prompt) > 20 and len(r.output) > 10)
    bad = [
        (Work(items=(WorkItem(1, 0, 3, sample=True, is_decode=False),)), bytes(8)),
        (Work(items=(WorkItem(1, 0, 1, sample=True, is_decode=False),)), np.int32(320).tobytes()),
        (Work(items=(WorkItem(1, 0, 0, sample=True, is_decode=False),)), b""),
        (Work(items=(WorkItem(1, 0, 1, sample=True, is_decode=False),), dtype="float32"), bytes(256)),
        (Work(opens=(OpenRequest(1, (Hop("n0", 0, 6),), 100, SamplingParams()),)), None),
    ]
    assert isinstance(talk.ask(load_of(model_dir("test-llama"))), Loaded)
    prompt = np.array(reference.prompt, dtype=np.int32).tobytes()
    opened = OpenRequest(1, (Hop("n0", 0, 6),), 90, SamplingParams())
    item = WorkItem(1, 0, len(reference.prompt), sample=True, is_decode=False)

    tokens = []
    answer = talk.ask(Work(items=(item,), opens=(opened,)), prompt)
    while True:
        assert isinstance(answer, Sampled)
        ((request, token),) = answer.tokens
        assert request == 1
        tokens.append(token)
        if len(tokens) == len(reference.output):
            break
        if bad:
            refused = talk.ask(*bad.pop())
            assert isinstance(refused, RequestsFailed)
            assert refused.attempts == (1,)
        past = len(reference.prompt) + len(tokens) - 1
        item = WorkItem(1, past, 1, sample=True, is_decode=True)
        answer = talk.ask(Work(items=(item,)), np.int32(token).tobytes())

    assert not bad
    assert tuple(tokens) == reference.output
    counted = talk.ask(ReadCounters())
    assert isinstance(counted, Counters)
    assert (counted.prefill_tokens, counted.decode_tokens) == (len(reference.prompt), len(tokens) - 1)
    assert counted.sent["coordinator"].tokens == len(tokens)


def test_a_hop_to_a_node_that_is_no_peer_is_refused(talk: Talk, model_dir: ModelDir) -> None:
    assert isinstance(talk.ask(load_of(model_dir("test-llama"), end=3)), Loaded)
    opened = OpenRequest(1, (Hop("n0", 0, 3), Hop("elsewhere", 3, 6)), 4, SamplingParams())
    item = WorkItem(1, 0, 1, sample=True, is_decode=False)

    answer = talk.ask(Work(items=(item,), opens=(opened,)), np.int32(40).tobytes())

    assert isinstance(answer, RequestsFailed)
    assert "a pipeline goes on to node elsewhere, whose address was not given" in answer.message
    assert isinstance(talk.ask(Describe()), Description)


def test_who_leaves_before_its_answer_disturbs_nobody(running: RunningAgents, model_dir: ModelDir, talk: Talk) -> None:
    assert isinstance(talk.ask(load_of(model_dir("test-llama"))), Loaded)
    with talking(running) as leaving:
        assert isinstance(leaving.ask(load_of(model_dir("test-llama"), start=2)), Loaded)
        opened = OpenRequest(1, (Hop("n0", 2, 6),), 80, SamplingParams())
        item = WorkItem(1, 0, 80, sample=True, is_decode=False)
        leaving.say(encode(Work(items=(item,), opens=(opened,), dtype="float32")), bytes(80 * 64 * 4))

    assert isinstance(talk.ask(Describe()), Description)
    assert isinstance(talk.ask(load_of(model_dir("test-llama"))), Loaded)


# Processes


def test_sigterm_and_shutdown_end_an_agent_with_0(running: RunningAgents, tmp_path: Path) -> None:
    agents = [AgentProcess(running.key_file, tmp_path / f"{number}.log") for number in range(2)]
    transport = Transport(running.key)
    try:
        addresses = [agent.address() for agent in agents]
        agents[0].send_signal(signal.SIGTERM)
        talk = Talk(transport, addresses[1])
        assert talk.ask(Shutdown()) == Done()
        assert [agent.wait() for agent in agents] == [0, 0]
        assert "Traceback" not in "".join(agent.log.read_text() for agent in agents)
    finally:
        transport.close()
        for agent in agents:
            agent.end()


def agent_command(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "helixbench", "agent", *options],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONWARNINGS": ""},
    )


def test_an_agent_whose_address_is_taken_ends_with_one_message(running: RunningAgents) -> None:
    ended = agent_command("--listen", running.addresses["n0"], "--key", str(running.key_file))

    assert ended.returncode == 2
    assert ended.stderr.startswith(f"helixbench: --listen {running.addresses['n0']}: cannot be bound")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""
