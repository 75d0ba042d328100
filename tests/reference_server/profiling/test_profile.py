"""Agents that measure themselves and their links, and the profile that is made of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from helixbench.errors import InputError, MeasurementError
from helixbench.profiler.cluster import COORDINATOR, ClusterProfile, Device, ModelFacts
from helixbench.profiler.cost.model import GATHER_UP_TO_TOKENS
from helixbench.profiler.measure import sampler as sampling
from helixbench.profiler.measure.grid import grid, peak_points
from helixbench.profiler.measure.layer_times import batches
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.stage import Stage, StageOutput
from helixbench.progress import Reporter
from helixbench.records import load_record
from helixbench.reference_server.node.agent import Agent, AgentConfig
from helixbench.reference_server.profiling import coordinator as coordinator_cost
from helixbench.reference_server.profiling import loopback as ring
from helixbench.reference_server.profiling import node as self_profile
from helixbench.reference_server.profiling.cluster import profile_cluster, profiling_turns
from helixbench.reference_server.profiling.config import NetworkConfig, ProfileConfig
from helixbench.reference_server.profiling.coordinator import measure_coordinator
from helixbench.reference_server.wire.keys import ClusterKey, load_key_file, make_key_file
from helixbench.reference_server.wire.messages import Description, Profile
from tests.conftest import ModelDir
from tests.reference_server.threads import agents_in_threads

MAX_BATCH_TOKENS, MAX_CONTEXT_TOKENS = 16, 64


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of no use, in little time: what is tested is not how long anything takes."""
    monkeypatch.setattr(sampling, "MIN_BLOCK_S", 0.001)
    monkeypatch.setattr(sampling, "MIN_BLOCK_ITERATIONS", 2)
    monkeypatch.setattr(sampling, "MIN_ROUNDS", 1)
    monkeypatch.setattr(coordinator_cost, "_ROUNDS", 12)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    make_key_file(tmp_path / "cluster.key")
    return tmp_path / "cluster.key"


@pytest.fixture
def key(key_file: Path) -> ClusterKey:
    return load_key_file(key_file)


@pytest.fixture
def agent(key_file: Path) -> Iterator[Agent]:
    made = Agent(AgentConfig(listen="127.0.0.1:0", key=key_file, memory_bytes=1e8))
    made._controller = b"who has gone"  # is told of progress
    try:
        yield made
    finally:
        made.close()


def profile_command(model: Path, **changes: Any) -> Profile:
    fields: dict[str, Any] = {
        "model": str(model),
        "model_digest": ModelFiles(str(model)).digest(),
        "dtype": "float32",
        "max_batch_tokens": MAX_BATCH_TOKENS,
        "max_context_tokens": MAX_CONTEXT_TOKENS,
        "budget_s": 0.0,
    }
    return Profile(**(fields | changes))


Ran = tuple[int, tuple[tuple[int, int], ...]]  # layers, (past, new tokens) of each item


def test_what_is_timed_is_the_grid_run_by_the_stage_itself(
    agent: Agent, model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: set[Ran] = set()
    real = Stage.forward

    def forward(stage: Stage, items: Sequence[StageItem]) -> StageOutput:
        assert len({item.entry_layer for item in items}) == 1
        ran.add((stage.end - items[0].entry_layer, tuple(sorted((item.past, item.num_tokens) for item in items))))
        return real(stage, items)

    monkeypatch.setattr(Stage, "forward", forward)
    monkeypatch.setattr(self_profile, "points_to_add", lambda *_, **__: ())

    profiled = self_profile.profile(agent, profile_command(model_dir("test-llama")))

    kv_bytes = 2 * 2 * 16 * 4 * 4  # of one token in the 4 layers held
    layer_bytes = ModelFiles(str(model_dir("test-llama"))).facts(dtype="float32").layer_weight_bytes
    sizes = {
        "max_batch_tokens": MAX_BATCH_TOKENS,
        "max_context_tokens": MAX_CONTEXT_TOKENS,
        "max_kv_tokens": int((1e8 - 4 * layer_bytes) // kv_bytes),
    }
    points = grid(layer_counts=(2, 4), **sizes)
    peaks = peak_points(num_layers=4, gather_up_to_tokens=GATHER_UP_TO_TOKENS["cpu"], **sizes)
    expected: set[Ran] = {
        (p.num_layers, tuple(sorted([*p.prefills, *((past, 1) for past in p.decodes)])))
        for p in (*points, *peaks)
        if p.part == "layers"
    }
    first = batches(**sizes)[0]  # the budget is over before the second
    expected.add((4, ((first.past_tokens, 1),)))
    assert ran == expected, "the grid, what needs most memory, and a batch of which every layer is timed"
    assert profiled.quality is not None
    assert profiled.quality.layer_times is not None
    (timed,) = (part for part in profiled.quality.layer_times.parts if part.part == "layer")
    assert (timed.num_layers, timed.sequences, timed.past_tokens) == (4, 1, first.past_tokens)
    assert sorted((s.num_layers, s.first, s.last, s.held_out) for s in profiled.samples) == sorted(
        (p.num_layers, p.part == "embedding", p.part == "head", p.held_out) for p in points
    )
    assert {sample.batch for sample in profiled.samples} == {point.shape for point in points}
    assert min(sample.median_s for sample in profiled.samples) > 0
    assert profiled.max_layers == 6
    assert "4 layers held" in profiled.source
    assert agent._runtime is None, "nothing stays loaded"


def test_the_cache_is_empty_between_batches(agent: Agent, model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    real = ring.Ring._open

    def opened(own: Any, point: Any) -> list[int]:
        used.append(agent.runtime.runner.kv.used_tokens)
        return real(own, point)

    monkeypatch.setattr(ring.Ring, "_open", opened)
    self_profile.profile(agent, profile_command(model_dir("test-llama")))

    assert len(used) > 20
    assert set(used) == {0}


def test_memory_that_runs_out_in_an_iteration_ends_the_profile_at_once_and_not_the_agent(
    agent: Agent, model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ran, failing = Stage.forward, 0, 2

    def forward(stage: Stage, items: Sequence[StageItem]) -> StageOutput:
        nonlocal ran
        ran += 1
        if ran == failing:
            raise torch.OutOfMemoryError("2 GiB wanted")
        return real(stage, items)

    monkeypatch.setattr(Stage, "forward", forward)
    command = profile_command(model_dir("test-llama"))

    with pytest.raises(MeasurementError, match=r"an iteration of \d+ tokens: no memory .* less --memory"):
        self_profile.profile(agent, command)
    assert ran == failing
    assert agent._runtime is None
    assert self_profile.profile(agent, command).samples


@pytest.mark.parametrize(("device_type", "has_tiles"), [("cpu", False), ("cuda", True)])
def test_points_are_added_where_the_fit_of_that_kind_of_device_misses(
    monkeypatch: pytest.MonkeyPatch, model_dir: ModelDir, device_type: str, has_tiles: bool
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(self_profile, "fit_cost", lambda _samples, **options: asked.append(options))
    monkeypatch.setattr(self_profile, "points_to_add", lambda *_, **__: ())
    sampler = sampling.Sampler((), lambda _: pytest.fail("run"), seed=0)

    refine = self_profile._refinement(sampler, profile_command(model_dir("test-llama")), device_type=device_type)

    assert refine(()) == ()
    assert [(one["has_tiles"], one["gather_up_to_tokens"]) for one in asked] == [
        (has_tiles, GATHER_UP_TO_TOKENS[device_type])
    ]


def test_a_node_too_small_for_a_layer_is_refused(key_file: Path, model_dir: ModelDir) -> None:
    agent = Agent(AgentConfig(listen="127.0.0.1:0", key=key_file, memory_bytes=2e5))
    try:
        with pytest.raises(InputError, match=r"one layer with room for 1024 KV tokens takes .* MB; the node has 0 MB"):
            self_profile.profile(agent, profile_command(model_dir("test-llama")))
    finally:
        agent.close()


FACTS = ModelFacts(
    name="m",
    num_layers=80,
    activation_bytes_per_token=1.0,
    token_bytes=4.0,
    layer_weight_bytes=1e9,
    kv_bytes_per_token_per_layer=1e4,
    embedding_bytes=3e9,
    head_bytes=2e9,
)


def test_a_gpu_keeps_room_for_embedding_and_head_and_for_the_workspace() -> None:
    on_cpu, on_gpu = (self_profile.what_fits(FACTS, memory_bytes=40e9, device_type=kind) for kind in ("cpu", "cuda"))

    assert on_cpu.num_layers == 39, "10 MB of KV cache beside each"
    assert on_gpu.num_layers == 29, "of nine tenths of what two layers, embedding and head leave"
    for fit, room in ((on_cpu, 40e9), (on_gpu, 0.9 * 33e9)):
        used = fit.num_layers * (FACTS.layer_weight_bytes + fit.kv_tokens * FACTS.kv_bytes_per_token_per_layer)
        assert room - fit.num_layers * FACTS.kv_bytes_per_token_per_layer < used <= room
        assert fit.layer_bytes == 1e9 + 1024 * 1e4
    with pytest.raises(InputError, match=r"takes 1010 MB; the node has 0 MB for it"):
        self_profile.what_fits(FACTS, memory_bytes=6e9, device_type="cuda")


def test_a_workspace_larger_than_the_memory_leaves_no_layers(
    agent: Agent, model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring.Ring, "workspace_bytes", lambda _ring, _point: 2e8)
    assert self_profile.profile(agent, profile_command(model_dir("test-llama"))).max_layers == 0


def test_a_model_of_two_layers_cannot_be_profiled(agent: Agent, model_dir: ModelDir, tmp_path: Path) -> None:
    shutil.copytree(model_dir("test-llama"), tmp_path / "two")
    config = tmp_path / "two" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 6', '"num_hidden_layers": 2'))

    with pytest.raises(InputError, match="model two has 2 layers; profiling needs at least 3"):
        self_profile.profile(agent, profile_command(tmp_path / "two"))


def test_another_nodes_model_is_refused(agent: Agent, model_dir: ModelDir) -> None:
    with pytest.raises(InputError, match="its files on this node differ"):
        self_profile.profile(agent, profile_command(model_dir("test-llama"), model_digest="sha256:other"))


# The coordinator and the whole


def test_the_coordinators_times_are_measured(key: ClusterKey) -> None:
    times = measure_coordinator(key)

    assert times.message_s > 0
    assert min(times.token_s, times.request_s) >= 0


def test_emulated_nodes_are_checked_a_few_at_a_time() -> None:
    """They share the cores of a machine; real devices are their own."""
    kinds = {"a": "cuda", "b": "cpu"} | {f"e{index}": "emulated" for index in range(6)}
    described = {
        name: Description(device=Device(kind=kind, name="made-up", memory_bytes=1e9), versions={}, machine={})
        for name, kind in kinds.items()
    }
    assert profiling_turns(described) == [("a", "b"), ("e0", "e1", "e2", "e3"), ("e4", "e5")]
    assert profiling_turns({"e0": described["e0"]}) == [("e0",)]


def quick_config(model: Path, addresses: dict[str, str], key_file: Path, output: Path, **changes: Any) -> ProfileConfig:
    config = ProfileConfig(
        model=str(model),
        dtype="float32",
        addresses=addresses,
        key_file=key_file,
        output=output,
        testbed="two threads",
        limited_nics=(),
        command="helixbench profile",
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_context_tokens=MAX_CONTEXT_TOKENS,
        budget_s=0.0,
        network=NetworkConfig(seconds=0.01, nic_seconds=0.01),
    )
    return msgspec.structs.replace(config, **changes)


def test_a_cluster_is_measured_whole(
    key_file: Path, key: ClusterKey, model_dir: ModelDir, tmp_path: Path, no_iperf3: None
) -> None:
    output = tmp_path / "cluster.json"
    nodes = ("big", "small")
    with agents_in_threads(nodes, key_file) as addresses, Reporter() as reporter:
        config = quick_config(model_dir("test-llama"), addresses, key_file, output, limited_nics=("small",))
        made = profile_cluster(config, key, reporter)

    assert load_record(output, ClusterProfile) == made
    assert [node.name for node in made.nodes] == list(nodes)
    assert made.model.digest == ModelFiles(config.model).digest() == made.provenance.inputs["model"]
    assert (made.testbed, made.provenance.command) == ("two threads", "helixbench profile")
    pairs = [(link.src, link.dst) for link in made.links]
    assert pairs == [(a, b) for a in (COORDINATOR, *nodes) for b in (COORDINATOR, *nodes) if a != b]
    assert all(link.source.startswith("helixbench transport") for link in made.links)
    for node in made.nodes:
        assert node.cost is not None
        assert node.cost.max_batch_tokens == MAX_BATCH_TOKENS
        assert len(node.cost.samples) >= 40
        assert node.cost.stage.gather_up_to_tokens == GATHER_UP_TO_TOKENS["cpu"]
        assert node.cost.stage.variation > 0
        assert node.max_layers == 6
        assert node.device.kind == "cpu"
    big, small = made.nodes
    assert big.nic_out_bytes_per_s is None
    to_and_from = [[link.bandwidth_bytes_per_s for link in made.links if end(link) == "small"] for end in ENDS]
    assert [small.nic_out_bytes_per_s, small.nic_in_bytes_per_s] == [max(rates) for rates in to_and_from]
    assert small.nic_source == (
        "out: best of 2 links alone (all at once: iperf3 did not measure all of its links); "
        "in: best of 2 links alone (all at once: iperf3 did not measure all of its links)"
    )
    assert all([time.message_bytes for time in link.message_times][:1] == [1 << 10] for link in made.links)
    assert made.coordinator.message_s is not None


ENDS = (lambda link: link.src, lambda link: link.dst)
