"""This machine's device measured by an agent in this process, interrupted and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from helixbench.__main__ import app
from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.profiler.measure import sampler as sampling
from helixbench.profiler.measure.grid import GridPoint
from helixbench.profiler.measure.sampler import MIN_ROUNDS, least_seconds
from helixbench.profiler.model.model import open_model
from helixbench.records import load_record, save_record
from helixbench.reference_server.profiling import local as module
from helixbench.reference_server.profiling import node as self_profile
from helixbench.reference_server.profiling.cluster import profile_command
from helixbench.reference_server.profiling.config import NodeProfileConfig
from helixbench.reference_server.profiling.local import PartialProfile, plan_node, profile_node
from tests.conftest import ModelDir


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of no use, in little time."""
    monkeypatch.setattr(sampling, "MIN_BLOCK_S", 0.001)
    monkeypatch.setattr(sampling, "MIN_BLOCK_ITERATIONS", 2)
    monkeypatch.setattr(sampling, "MIN_ROUNDS", 2)
    monkeypatch.setattr(self_profile, "points_to_add", lambda *_, **__: ())


@pytest.fixture
def config(model_dir: ModelDir) -> NodeProfileConfig:
    return NodeProfileConfig(
        model=str(model_dir("test-llama")),
        dtype="float32",
        name="here",
        memory_bytes=1e8,
        max_batch_tokens=16,
        max_context_tokens=64,
        budget_s=0.0,
        command="helixbench profile --device cpu",
    )


class Interrupt:
    """Ctrl-C at that block."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, done: int, expected: int) -> None:
        assert done <= expected
        if done == self.at:
            raise KeyboardInterrupt


def test_a_node_is_a_cluster_of_one_without_links(config: NodeProfileConfig, tmp_path: Path) -> None:
    partial = tmp_path / "node.json.partial"
    made = profile_node(config, partial=partial, resume=False)

    (node,) = made.nodes
    assert node.name == "here"
    assert made.links == ()
    assert node.cost is not None
    assert node.cost.quality is not None
    assert node.cost.quality.memory is not None
    assert node.cost.quality.memory.kv_bytes_per_token_per_layer == made.model.kv_bytes_per_token_per_layer
    assert len(node.cost.quality.drift) == 1
    assert {"torch", "transformers", "helixbench"} <= node.versions.keys()
    assert made.provenance.command == "helixbench profile --device cpu"
    assert not partial.exists()


def test_an_interrupted_run_keeps_its_rounds_and_is_gone_on_with(config: NodeProfileConfig, tmp_path: Path) -> None:
    partial = tmp_path / "node.json.partial"
    with pytest.raises(KeyboardInterrupt):
        profile_node(config, partial=partial, resume=False, on_block=Interrupt(80))
    kept = load_record(partial, PartialProfile)
    points = {block.point for block in kept.blocks}
    assert len(points) == len(kept.blocks) < 80, "one whole round"

    told: list[int] = []
    made = profile_node(config, partial=partial, resume=True, on_block=lambda done, _: told.append(done))

    assert len(told) == len(points)
    assert made.nodes[0].cost is not None
    assert {sample.repeats for sample in made.nodes[0].cost.samples} == {2}
    assert not partial.exists()


def test_refined_points_and_discards_are_gone_on_with(
    config: NodeProfileConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = GridPoint(part="layers", num_layers=4, decodes=(7,) * 5)
    causes = iter(["steal", "steal"])
    monkeypatch.setattr(
        self_profile, "points_to_add", lambda *_, already_added, **__: () if already_added else (added,)
    )
    monkeypatch.setattr(self_profile, "find_disturbance", lambda _: lambda: lambda: next(causes, None))
    config = msgspec.structs.replace(config, budget_s=600.0)
    monkeypatch.setattr(sampling, "NOISE_TARGET", 1e9)  # no further rounds of what is noisy
    partial = tmp_path / "node.json.partial"

    def interrupt(_done: int, _expected: int) -> None:
        if partial.exists() and any(block.is_refined for block in load_record(partial, PartialProfile).blocks):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile_node(config, partial=partial, resume=False, on_block=interrupt)
    kept = load_record(partial, PartialProfile)
    assert [block.point for block in kept.blocks if block.is_refined] == [added]

    made = profile_node(config, partial=partial, resume=True).nodes[0].cost

    assert made is not None
    assert made.quality is not None
    assert (made.quality.num_refined, made.quality.discarded) == (1, {"steal": 2})
    assert sum(sample.is_refined for sample in made.samples) == 1


@pytest.mark.parametrize(
    ("then", "now", "differing"),
    [({"driver": "570.1"}, {"driver": "580.2"}, "driver: 570.1 then, 580.2 now"), ({"uuid": "a"}, {}, "uuid: a then")],
)
def test_blocks_of_another_device_of_the_same_name_are_refused(
    config: NodeProfileConfig, tmp_path: Path, then: dict[str, str], now: dict[str, str], differing: str
) -> None:
    made_of = []
    with module.agent_here(config) as (agent, command, _):
        for facts in (then, now):
            agent.device = msgspec.structs.replace(agent.device, facts=agent.device.facts | facts)
            made_of.append(module._made_of(agent, command))
            agent.device = msgspec.structs.replace(
                agent.device, facts={name: agent.device.facts[name] for name in agent.device.facts if name not in facts}
            )
    partial = tmp_path / "node.json.partial"
    save_record(partial, PartialProfile(made_of=made_of[0], blocks=()))
    with pytest.raises(InputError, match=differing):
        module._kept(partial, made_of[1])


def test_another_runs_blocks_are_refused(config: NodeProfileConfig, tmp_path: Path, model_dir: ModelDir) -> None:
    partial = tmp_path / "node.json.partial"
    with pytest.raises(InputError, match="nothing to resume; leave out --resume"):
        profile_node(config, partial=partial, resume=True)
    with pytest.raises(KeyboardInterrupt):
        profile_node(config, partial=partial, resume=False, on_block=Interrupt(80))
    other = msgspec.structs.replace(config, max_context_tokens=32)
    with pytest.raises(InputError, match=r"is of another profile .longest context: 64 then, 32 now"):
        profile_node(other, partial=partial, resume=True)


def test_a_plan_says_how_much_and_how_long(config: NodeProfileConfig) -> None:
    times = plan_node(config)
    assert times.num_points > 30
    assert 0 < times.num_held_out < times.num_points
    assert (times.num_rounds, times.num_layers) == (MIN_ROUNDS, 4)
    assert min(times.least_s, times.prepare_s) > 0


def test_time_of_the_rounds_is_that_of_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MIN_BLOCK_S", 0.12)
    monkeypatch.setattr(sampling, "MIN_BLOCK_ITERATIONS", 2)
    monkeypatch.setattr(sampling, "MIN_ROUNDS", 3)
    points = [GridPoint(part="layers", num_layers=4, decodes=(1,) * size) for size in (1, 11)]
    # 1 s and 3 s an iteration: one to warm up and two timed, three rounds
    assert least_seconds(points, first=(1.0, 1.0), second=(11.0, 3.0)) == pytest.approx(3 * (3 * 1 + 3 * 3))


def test_the_command_writes_a_profile_and_prints_it(config: NodeProfileConfig, tmp_path: Path) -> None:
    output = tmp_path / "node.json"
    options = [
        "--device",
        "cpu",
        "--model",
        config.model,
        "--memory",
        "100MB",
        "--max-batch-tokens",
        "16",
        "--max-context-tokens",
        "64",
    ]
    run = CliRunner().invoke(app, ["profile", *options, "--budget-s", "0", "-o", str(output)])

    assert run.exit_code == 0, run.output
    assert "held-out error" in run.stdout
    assert load_record(output, ClusterProfile).nodes[0].device.memory_bytes == 1e8

    planned = CliRunner().invoke(app, ["profile", *options, "--plan-only", "--json"])
    assert json.loads(planned.stdout)["num_layers"] == 4


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    config: NodeProfileConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "profile_node", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "node.json", tmp_path):
        run = CliRunner().invoke(app, ["profile", "--device", "cpu", "--model", config.model, "-o", str(output)])
        assert isinstance(run.exception, InputError), run.output
        assert f"{output}: cannot be written" in str(run.exception)


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("cpu", {}, (128, 512)),
        ("cuda", {}, (1024, 1024)),  # the model ends there
        ("cuda", {"max_batch_tokens": 64, "max_context_tokens": 256}, (64, 256)),
    ],
)
def test_what_is_measured_where_nothing_is_said_suits_the_device_and_the_model(
    config: NodeProfileConfig, kind: str, changes: dict[str, int], expected: tuple[int, int]
) -> None:
    ranges = {"max_batch_tokens": None, "max_context_tokens": None} | changes
    command = profile_command(open_model(config.model), msgspec.structs.replace(config, **ranges), device_kind=kind)
    assert (command.max_batch_tokens, command.max_context_tokens) == expected
