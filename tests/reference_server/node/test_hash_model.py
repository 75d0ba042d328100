"""A served hash model gives the reference's tokens, and whatever a server can get wrong shows in them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from helixbench.errors import MeasurementError
from helixbench.profiler.model.hash_model import HashModel
from helixbench.profiler.stage.hash_stage import HashCache
from helixbench.reference_server.node.agent import Agent, AgentConfig
from helixbench.reference_server.node.load import load_runner
from helixbench.reference_server.node.runtime import NodeRuntime
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.held import due_s
from helixbench.reference_server.wire.keys import load_key_file, make_key_file
from helixbench.reference_server.wire.messages import Load, Loaded, RequestsFailed, Work
from helixbench.reference_server.wire.transport import Transport, send
from helixbench.solver.problem.plan import Hop
from helixbench.solver.scheduling.requests import Request
from helixbench.solver.scheduling.work import OpenRequest, SamplingParams, WorkItem
from tests.conftest import ModelDir
from tests.hash_models import expected_tokens, make_small
from tests.reference_server.hash_cluster import Change, HashCluster, mixed_requests
from tests.reference_server.plans import OVERLAPPING, PLANS, make_plan
from tests.reference_server.running import RunningAgents, run_to_end

WORD = 8
STATE_BYTES = 256

# 12 layers on 7 nodes: three pipelines, of which two enter nodes later than where their ranges start
DEEP = (
    {"a": (0, 5), "b": (0, 4), "c": (3, 9), "d": (4, 8), "e": (8, 12), "f": (7, 12), "g": (5, 12)},
    [(["a", "c", "f"], 3.0), (["b", "d", "e"], 2.0), (["a", "g"], 1.0), (["b", "c", "e"], 1.0)],
)


def load_command(directory: Path, digest: str) -> Load:
    """All six layers."""
    return Load(
        model=str(directory),
        model_digest=digest,
        dtype="float32",
        node="n0",
        start=0,
        end=6,
        kv_capacity_tokens=100,
        max_batch_tokens=8,
        max_decode_batch=None,
        peers={},
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HashModel:
    return make_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> HashModel:
    return make_small(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=12)


@pytest.mark.parametrize("plan", ["two pipelines", "partial inference", "three in a row", "deep"])
def test_2000_requests_are_answered_as_by_the_reference(model: HashModel, deep_model: HashModel, plan: str) -> None:
    """500 for each plan, of which the KV caches hold some 20 at a time, so extents are found, packed and reused."""
    served = deep_model if plan == "deep" else model
    placement, paths = DEEP if plan == "deep" else PLANS[plan]
    cluster = HashCluster(make_plan(served.directory, placement, paths, kv_capacity_tokens=900), served, seed=1)

    assert cluster.serve(mixed_requests(500, seed=2, vocab_size=served.vocab_size)) == {}
    assert len(cluster.pipelines_taken) == len(paths)


def test_a_message_that_is_due_as_it_is_read_joins_the_next_iteration(model: HashModel, tmp_path: Path) -> None:
    make_key_file(tmp_path / "key")
    agent = Agent(AgentConfig(listen="127.0.0.1:0", key=tmp_path / "key", memory_bytes=1e8))
    transport = Transport(load_key_file(tmp_path / "key"))
    try:
        agent.load(load_command(model.directory, model.digest()))
        sender = transport.connect(agent.address)
        opened = OpenRequest(1, (Hop("n0", 0, 6),), 8, SamplingParams())
        work = Work(items=(WorkItem(1, 0, 2, sample=False, is_decode=False),), opens=(opened,), due_s=due_s(-1.0))
        send(sender, work, bytes(8))

        assert agent.turn(60_000), "it was held for another turn, which a busy node makes an iteration later"
    finally:
        transport.close()
        agent.close()


def overlapping(model: HashModel, change: Change) -> HashCluster:
    """n1 runs requests that enter at its first layer, 2, beside others that enter at layer 4."""
    plan = make_plan(model.directory, *OVERLAPPING, kv_capacity_tokens=600)
    return HashCluster(plan, model, seed=3, change=change)


def requests(model: HashModel, count: int = 60) -> list[Request]:
    return mixed_requests(count, seed=4, vocab_size=model.vocab_size)


def unspoiled(_node: str, work: Work, payload: bytes | None) -> tuple[Work, bytes | None]:
    return work, payload


class MovedEntry:
    """Has one request enter a node this many layers later than where its hidden states are."""

    def __init__(self, by: int) -> None:
        self._by = by
        self.request: int | None = None

    def __call__(self, node: str, work: Work, payload: bytes | None) -> tuple[Work, bytes | None]:
        opens = tuple(self._moved(node, opened) for opened in work.opens)
        return msgspec.structs.replace(work, opens=opens), payload

    def _moved(self, node: str, opened: OpenRequest) -> OpenRequest:
        late = [hop for hop in opened.hops if (hop.node, hop.start) == (node, 4)]
        if node != "n1" or not late or self.request is not None:
            return opened
        self.request = opened.request
        hops = (Hop(hop.node, hop.start + self._by, hop.end) if hop in late else hop for hop in opened.hops)
        return msgspec.structs.replace(opened, hops=tuple(hops))


@pytest.mark.parametrize("by", [1, -1], ids=["a skipped layer", "a layer run twice"])
def test_a_wrong_layer_is_caught(model: HashModel, by: int) -> None:
    spoiled = MovedEntry(by)
    wrong = overlapping(model, spoiled).serve(requests(model))
    assert spoiled.request is not None
    assert wrong == {spoiled.request: 0}


def test_two_swapped_requests_are_caught(model: HashModel) -> None:
    """Of two decoding requests in one message between nodes, each gets the other's hidden state, once."""
    swapped: list[int] = []

    def swap(node: str, work: Work, payload: bytes | None) -> tuple[Work, bytes | None]:
        pair = [item.request for item in work.items[:2] if item.is_decode]
        if swapped or payload is None or work.dtype == "int32" or len(pair) < 2:
            return work, payload
        swapped.extend(pair)
        first, second = payload[:STATE_BYTES], payload[STATE_BYTES : 2 * STATE_BYTES]
        return work, second + first + payload[2 * STATE_BYTES :]

    wrong = overlapping(model, swap).serve(requests(model))
    assert len(swapped) == 2
    assert set(wrong) == set(swapped)


def test_a_kv_cache_that_forgets_to_move_its_entries_is_caught(
    model: HashModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    monkeypatch.setattr(HashCache, "_move", lambda _cache, source, *_: moved.append(source))
    wrong = overlapping(model, unspoiled).serve(requests(model, 200))
    assert moved, "the caches were never packed"
    assert wrong


def test_kv_slots_of_another_request_are_caught(model: HashModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one node two requests share slots: what one caches, the other reads."""
    cluster = overlapping(model, unspoiled)
    kv = cluster.nodes["n1"].runner.kv
    real, shared = kv.extent, {7: 0, 9: 0}  # request -> offset, both at the front

    def extent(request: int) -> object:
        own = real(request)
        return msgspec.structs.replace(own, offset=shared[request]) if request in shared else own

    monkeypatch.setattr(kv, "extent", extent)
    assert cluster.serve(requests(model))


def test_without_a_fault_nothing_is_caught(model: HashModel) -> None:
    assert overlapping(model, unspoiled).serve(requests(model)) == {}


def node(model: HashModel) -> NodeRuntime:
    runner = load_runner(model, start=0, end=6, kv_capacity_tokens=100, dtype="float32", device="cpu")
    return NodeRuntime("here", runner, max_batch_tokens=8)


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": SamplingParams(temperature=0.5)},
        {"sampling": SamplingParams(num_logprobs=1)},
        {"sampling": SamplingParams(), "stop_from": 5, "stop_token_ids": (3,)},
    ],
    ids=["temperature", "log probabilities", "minimum output"],
)
def test_what_needs_logits_is_refused(model: HashModel, options: dict[str, object]) -> None:
    runtime = node(model)
    opened = OpenRequest(1, (Hop("here", 0, 6),), 10, **options)  # type: ignore[arg-type]
    (out,) = runtime.accept(Work(opens=(opened,)), None)
    assert isinstance(out.message, RequestsFailed)
    assert "a hash model decodes greedily, without log probabilities or" in out.message.message
    assert runtime.runner.kv.used_tokens == 0


@pytest.mark.parametrize(("wire", "state_bytes"), [("full", STATE_BYTES), ("small", WORD)])
def test_hidden_states_are_as_long_on_the_wire_as_the_models(tmp_path: Path, wire: str, state_bytes: int) -> None:
    served = make_small(tmp_path, wire=wire)
    runner = load_runner(served, start=0, end=3, kv_capacity_tokens=100, dtype="float32", device="cpu")
    first = NodeRuntime("here", runner, max_batch_tokens=8)
    hops = (Hop("here", 0, 3), Hop("there", 3, 6))
    cluster = HashCluster(make_plan(served.directory, *PLANS["three in a row"]), served)

    first.accept(Work(opens=(OpenRequest(1, hops, 10, SamplingParams()),)), None)
    first.accept(Work(items=(WorkItem(1, 0, 3, sample=True, is_decode=False),)), bytes(12))
    (out,) = first.run_batch({True: 0, False: 0})

    assert out.payload is not None
    assert len(out.payload) == 3 * state_bytes == 3 * served.facts(dtype="float32").activation_bytes_per_token
    with pytest.raises(MeasurementError, match=f"need {2 * state_bytes} bytes of uint64 for 2 tokens, got"):
        first.runner.read(bytes(3), num_tokens=2, dtype="uint64")
    assert cluster.serve(mixed_requests(20, seed=1, vocab_size=served.vocab_size)) == {}


def test_real_agents_serve_it(running: RunningAgents, model: HashModel) -> None:
    asked = mixed_requests(40, seed=5, vocab_size=model.vocab_size)
    with running.engine(make_plan(model.directory, *OVERLAPPING), model.directory) as engine:
        outcome = run_to_end(engine, asked)
    assert outcome.tokens == {
        request.number: expected_tokens(model, request.prompt, request.max_tokens) for request in asked
    }
    assert len(set(outcome.pipelines.values())) == 3


def test_a_stop_token_ends_an_output(running: RunningAgents, model: HashModel) -> None:
    prompt = (5, 6, 7)
    whole = expected_tokens(model, prompt, 12)
    asked = Request(number=0, prompt=prompt, max_tokens=12, stop_token_ids=frozenset({whole[4]}))
    with running.engine(make_plan(model.directory, *PLANS["one node"]), model.directory) as engine:
        outcome = run_to_end(engine, [asked])
    assert (outcome.tokens[0], outcome.reasons[0]) == (whole[:5], "stop")


TELL_MODULES = """
import json
import sys
from helixbench.reference_server.launch import agent

class Told(agent.Agent):
    def close(self):
        print(json.dumps(sorted(sys.modules)), file=sys.stderr)
        super().close()

agent.Agent = Told
sys.exit(agent.main(sys.argv[1:]))
"""


def test_an_agent_that_serves_it_loads_neither_torch_nor_the_command_line(
    running: RunningAgents, model: HashModel
) -> None:
    argv = [sys.executable, "-c", TELL_MODULES, "--listen", "127.0.0.1:0", "--key", str(running.key_file)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["listening"]
        alone = RunningAgents({"n0": address}, running.key_file)
        with alone.engine(make_plan(model.directory, *PLANS["one node"]), model.directory) as engine:
            outcome = run_to_end(engine, mixed_requests(3, seed=6, vocab_size=model.vocab_size))
        process.terminate()
        _, err = process.communicate(timeout=60)
    modules = json.loads(err.splitlines()[-1])
    loaded = {name.split(".")[0] for name in modules}
    assert len(outcome.reasons) == 3
    assert "numpy" in loaded
    assert not [name for name in modules if name.startswith("helixbench.solver.placement")]
    assert not {"torch", "transformers", "safetensors", "scipy", "networkx", "typer", "rich", "pytest"} & loaded


def test_an_agent_that_held_a_hash_model_can_load_a_real_one(
    running: RunningAgents, model: HashModel, model_dir: ModelDir
) -> None:
    real = model_dir("test-llama")
    with Agents({"n0": running.addresses["n0"]}, running.key) as agents:
        for directory in (model.directory, real, model.directory):
            plan = make_plan(directory, *PLANS["one node"])
            command = load_command(directory, plan.model_digest)
            assert agents.ask_one("n0", command, Loaded, timeout_s=60.0).kv_capacity_tokens == 100
