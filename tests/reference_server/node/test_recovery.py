"""Nodes are killed, freeze and come back, links are cut and heal, while requests are served: none is lost, none wrong.

The coordinator, the router and every node's runtime are those of the server; a seed draws the order of all events.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

from helixbench.profiler.model.hash_model import HashModel
from helixbench.solver.problem.plan import Plan
from tests.hash_models import make_small
from tests.reference_server.hash_cluster import HashCluster, mixed_requests
from tests.reference_server.plans import make_plan

# 12 layers on 8 nodes: every layer is held twice at least, by ranges of unlike lengths
PLACEMENT = {"a": (0, 5), "b": (0, 4), "c": (3, 9), "d": (4, 8), "e": (8, 12), "f": (7, 12), "g": (5, 12), "h": (0, 12)}
PATHS = [(["a", "c", "f"], 3.0), (["b", "d", "e"], 2.0), (["a", "g"], 1.0), (["b", "c", "e"], 1.0), (["h"], 1.0)]

NUM_SCHEDULES = int(os.environ.get("HELIXBENCH_SCHEDULES", "50"))
"""Schedules to run, from seed 0; ``-k "[SEED]"`` repeats one."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HashModel:
    return make_small(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=12)


@pytest.fixture(scope="module")
def plan(model: HashModel) -> Plan:
    return make_plan(model.directory, PLACEMENT, PATHS, kv_capacity_tokens=300)


def harm(draw: random.Random, cluster: HashCluster) -> None:
    """Now and then something breaks or heals; three nodes are whole at least."""
    chance = draw.random()
    whole = sorted(set(PLACEMENT) - cluster.lost)
    if chance < 0.002 and len(whole) > 3:
        cluster.kill(draw.choice(whole))
    elif chance < 0.004 and len(whole) > 3:
        cluster.freeze(draw.choice(whole))
    elif chance < 0.006:
        src, dst = draw.sample(sorted(PLACEMENT), 2)
        if (src, dst) not in cluster.links_down:
            cluster.cut((src, dst))
    elif chance < 0.012 and cluster.lost:
        cluster.bring_back(draw.choice(sorted(cluster.lost)))
    elif chance < 0.016 and cluster.links_down:
        cluster.heal(draw.choice(sorted(cluster.links_down)))


def run_schedule(seed: int, model: HashModel, plan: Plan) -> tuple[HashCluster, dict[int, int]]:
    draw = random.Random(f"harm {seed}")
    memory = draw.choice([0, 20_000, 1 << 30])
    cluster = HashCluster(plan, model, seed=seed, replay_memory_bytes=memory)
    requests = mixed_requests(30, seed=seed, vocab_size=model.vocab_size)
    return cluster, cluster.serve(requests, on_turn=lambda cluster: harm(draw, cluster))


@pytest.mark.parametrize("seed", range(NUM_SCHEDULES))
def test_every_request_gets_the_tokens_of_an_undisturbed_run(seed: int, model: HashModel, plan: Plan) -> None:
    _, wrong = run_schedule(seed, model, plan)
    assert wrong == {}


def test_a_seed_gives_the_same_run_twice(model: HashModel, plan: Plan) -> None:
    (one, _), (two, _) = (run_schedule(3, model, plan) for _ in range(2))
    assert one.log == two.log
    assert len(one.log) > 500


def test_schedules_reach_every_way_on(model: HashModel, plan: Plan) -> None:
    """Every kind of fault, replays, tokens that enter at the coordinator again, and replays that are not possible."""
    faults: Counter[str] = Counter()
    for seed in range(12):
        faults += run_schedule(seed, model, plan)[0].num_faults
    for kind in ("kill", "freeze", "cut", "bring back", "heal", "replay", "prefill again", "cannot replay", "late"):
        assert faults[kind], kind
