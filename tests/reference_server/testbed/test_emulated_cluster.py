"""Two emulated nodes, with a real model and with a hash model, profiled, planned and served by real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import pytest

from helixbench.profiler.cluster import ClusterProfile
from helixbench.profiler.emulated_device import EmulatedDevice, Roofline
from helixbench.profiler.model.files import ModelFiles
from helixbench.records import load_record, save_record
from helixbench.reference_server.profiling.emulated import MIN_KV_TOKENS
from helixbench.reference_server.run_log import RunLog
from helixbench.solver.problem.plan import Plan
from tests.conftest import ModelDir
from tests.hash_models import make_small
from tests.reference_server.testbed.beds import NO_ROOT

TIMEOUT_S = 200.0
LATENCY_S = 0.02
# Slow enough that a busy machine keeps up: 50 ms a layer of a model whose layers take it a millisecond.
ROOFLINE = Roofline(flops=1e12, memory_bandwidth_bytes_per_s=1e11, launch_s=0.05, max_batch_tokens=64)
TESTBED = """
time_scale = 2.0
[[node]]
name = "n"
count = 2
device = "emulated:device.json"
[network]
bandwidth = "100Mbit"
latency = "20ms"
"""


class Chain(NamedTuple):
    device: EmulatedDevice
    cluster: ClusterProfile
    plan: Plan
    run: RunLog
    report: str


@pytest.fixture(scope="module", params=["hash", "real"])
def chain(request: pytest.FixtureRequest, model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("emulated")
    made = make_small(folder / "hash") if request.param == "hash" else ModelFiles(model_dir("test-llama"))
    facts, model = made.facts(dtype="float32"), str(made.directory)
    # memory for four of the six layers, so that both nodes are needed
    memory_bytes = 4.5 * (facts.layer_weight_bytes + MIN_KV_TOKENS * facts.kv_bytes_per_token_per_layer)
    device = EmulatedDevice(name="made-up", memory_bytes=memory_bytes, roofline=ROOFLINE)
    save_record(folder / "device.json", device)
    (folder / "bed.toml").write_text(TESTBED)

    def helixbench(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "helixbench", *words],
            cwd=folder,
            env=os.environ | {"COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    place = ("--model", model, "--testbed", "bed.toml")
    helixbench("profile", *place, "--max-batch-tokens", "32", "--max-context-tokens", "64", "-o", "cluster.json")
    load = ("--prompt-tokens", "8", "--output-tokens", "4", "--concurrency", "2")
    helixbench("solve", "cluster.json", *load, "--time-limit-s", "5", "-o", "plan.json")
    helixbench("bench", "plan.json", *place, "--requests", "2", "-o", "run.json")
    return Chain(
        device,
        load_record(folder / "cluster.json", ClusterProfile),
        load_record(folder / "plan.json", Plan),
        load_record(folder / "run.json", RunLog),
        helixbench("report", "run.json"),
    )


def test_the_profile_has_the_devices_times_and_says_that_it_was_emulated(chain: Chain) -> None:
    cluster = chain.cluster
    assert [node.name for node in cluster.nodes] == ["n-0", "n-1"]
    for node in cluster.nodes:
        assert node.cost is not None
        assert node.cost.stage == ROOFLINE.stage_cost(cluster.model)
        assert node.cost.max_batch_tokens == 32
        assert node.cost.source.startswith("emulated made-up, data sheet: ")
        assert node.device.label == "made-up (emulated, data sheet)"
        assert node.max_layers == 4
    assert "EMULATED devices (2 made-up) at time scale 2" in cluster.testbed


@pytest.mark.root
@pytest.mark.skipif(bool(NO_ROOT), reason=f"needs namespaces: {NO_ROOT}")
def test_links_are_those_of_the_testbed_file_and_what_the_transport_takes(chain: Chain) -> None:
    for link in chain.cluster.links:
        assert link.bandwidth_bytes_per_s == 100e6 / 8
        assert LATENCY_S < link.latency_s < 2 * LATENCY_S
        assert link.source == "testbed file, shaped by tc"


def test_the_run_is_in_the_devices_time_and_says_how_well_it_was_kept(chain: Chain) -> None:
    run = chain.run
    assert set(run.emulated) == set(chain.plan.placement) == {"n-0", "n-1"}
    assert run.time_scale == 2.0
    assert set(run.device_names.values()) == {"made-up (emulated, data sheet)"}
    iterations = sum(use.iterations for use in run.nodes.values())
    assert iterations > 0
    for request in run.requests:
        assert request.tpot_s is not None
        assert request.tpot_s > chain.plan.num_layers * 0.05 + 2 * LATENCY_S, "every layer once, every message held"
    assert 0 < sum(use.busy_s for use in run.nodes.values()) < 2 * 1.1 * run.window.seconds


def test_reports_say_that_it_was_emulated(chain: Chain) -> None:
    assert "emulated: 2 of 2 nodes keep the times of other devices at time scale 2" in chain.report
    assert "made-up (emulated, data sheet)" in chain.report
    assert any("not there when the cluster was profiled: made-up" in note for note in chain.plan.assumptions.notes)
