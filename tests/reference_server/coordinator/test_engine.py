"""The engine on real agents: counters, KV slots, aborts, and agents that hang."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from helixbench.errors import InputError
from helixbench.profiler.model.files import ModelFiles
from helixbench.reference_server.coordinator.engine import Engine
from helixbench.reference_server.coordinator.loading import load_plan
from helixbench.reference_server.wire.client import AgentFailedError, Agents
from helixbench.reference_server.wire.messages import Counters
from helixbench.solver.problem.plan import Plan
from helixbench.solver.scheduling.requests import Request
from helixbench.solver.scheduling.work import Routing
from tests.conftest import GreedyOf, ModelDir
from tests.greedy import Greedy
from tests.reference_server.plans import (
    MAX_BATCH_TOKENS,
    ONE_NODE,
    OVERLAPPING,
    THREE_IN_A_ROW,
    TWO_PIPELINES,
    make_plan,
)
from tests.reference_server.running import STEP_MS, Outcome, RunningAgents, run_to_end

PRESET = "test-llama"


@pytest.fixture
def model(model_dir: ModelDir) -> Path:
    return model_dir(PRESET)


@pytest.fixture
def references(greedy_of: GreedyOf) -> tuple[Greedy, ...]:
    return greedy_of(PRESET)


def requests_of(references: tuple[Greedy, ...]) -> list[Request]:
    return [Request(number=n, prompt=r.prompt, max_tokens=len(r.output)) for n, r in enumerate(references)]


def ask_counters(engine: Engine) -> dict[str, Counters]:
    engine.ask_counters()
    while (counters := engine.counters()) is None:
        engine.step(STEP_MS)
    return counters


def test_counters_of_nodes_and_links_are_those_of_the_requests(
    running: RunningAgents, model: Path, references: tuple[Greedy, ...]
) -> None:
    requests = requests_of(references)
    prompts, outputs = (sum(len(part) for part in parts) for parts in zip(*references, strict=True))
    decodes = outputs - len(requests)  # the first token comes from the prompt

    with running.engine(make_plan(model, *THREE_IN_A_ROW), model) as engine:
        outcome = run_to_end(engine, requests)
        counters = ask_counters(engine)
        sent = engine.sent

    assert sum(len(tokens) for tokens in outcome.tokens.values()) == outputs
    for node, counted in counters.items():
        assert (counted.prefill_tokens, counted.decode_tokens) == (prompts, decodes), node
        assert decodes / MAX_BATCH_TOKENS < counted.iterations < (prompts + decodes) / 2, "nothing was batched"
        assert counted.busy_s > 0
    assert sent["n0"].tokens == prompts + decodes
    assert counters["n0"].sent["n1"].tokens == counters["n1"].sent["n2"].tokens == prompts + decodes
    assert counters["n2"].sent["coordinator"].tokens == outputs
    for counted, peer in ((counters["n0"], "n1"), (counters["n1"], "n2")):
        link = counted.sent[peer]
        tensor_bytes = link.tokens * 64 * 4
        assert tensor_bytes < link.payload_bytes < tensor_bytes + link.tokens * 40 + link.messages * 40
        assert link.messages == counted.iterations


def test_tight_caches_let_requests_in_one_by_one_and_lose_nothing(
    running: RunningAgents, model: Path, references: tuple[Greedy, ...]
) -> None:
    capacity = 150  # the largest request needs 110
    plan = make_plan(model, *TWO_PIPELINES, kv_capacity_tokens=capacity)

    with running.engine(plan, model) as engine:
        requests = requests_of(references)
        outcome = Outcome()
        outcome.note(engine.submit(requests))
        most = engine.coordinator.num_in_flight
        assert engine.coordinator.num_waiting > 16
        while len(outcome.reasons) < len(requests):
            engine.step(STEP_MS, on_events=outcome.note)
            most = max(most, engine.coordinator.num_in_flight)
        first, second = ask_counters(engine), ask_counters(engine)

    assert [tuple(outcome.tokens[request.number]) for request in requests] == [r.output for r in references]
    assert 2 <= most < 32
    for node in plan.placement:
        assert 110 <= first[node].kv_peak_tokens <= first[node].kv_capacity_tokens == capacity
        assert second[node].kv_peak_tokens == 0, "KV slots were not released"


def test_fixed_routing_uses_pipelines_that_share_no_node(
    running: RunningAgents, model: Path, references: tuple[Greedy, ...]
) -> None:
    with running.engine(make_plan(model, *OVERLAPPING), model, routing="fixed") as engine:
        outcome = run_to_end(engine, requests_of(references[:8]))
        counters = ask_counters(engine)

    assert [[hop.node for hop in hops] for hops in engine.pipelines] == [["n0", "n1"]]
    assert [tuple(outcome.tokens[number]) for number in range(8)] == [r.output for r in references[:8]]
    assert {node for node, counted in counters.items() if counted.iterations} == {"n0", "n1"}


@pytest.mark.parametrize("routing", ["random", "shortest-queue"])
def test_routings_that_go_hop_by_hop_serve_the_same_tokens(
    running: RunningAgents, model: Path, references: tuple[Greedy, ...], routing: Routing
) -> None:
    """Work goes between any two nodes that hold layers one after the other, planned pipeline or not."""
    plan = make_plan(model, *OVERLAPPING)
    with running.engine(plan, model, routing=routing) as engine:
        outcome = run_to_end(engine, requests_of(references))
        counters = ask_counters(engine)

    assert [tuple(outcome.tokens[number]) for number in range(len(references))] == [r.output for r in references]
    for pipeline in engine.pipelines:
        assert [hop.start for hop in pipeline] == [0, *(hop.end for hop in pipeline[:-1])]
        assert pipeline[-1].end == plan.num_layers
    assert len(engine.pipelines) > 1
    assert all(counted.iterations for counted in counters.values()), "some node was never chosen"


def test_stop_tokens_end_an_output_with_the_token(
    running: RunningAgents, model: Path, references: tuple[Greedy, ...]
) -> None:
    number, reference = next((n, r) for n, r in enumerate(references) if len(set(r.output)) > 4)
    stop = reference.output[len(reference.output) // 2]
    request = Request(
        number=number, prompt=reference.prompt, max_tokens=len(reference.output), stop_token_ids=frozenset({stop})
    )

    with running.engine(make_plan(model, *ONE_NODE), model) as engine:
        outcome = run_to_end(engine, [request])

    assert outcome.tokens[number] == list(reference.output[: reference.output.index(stop) + 1])
    assert outcome.reasons == {number: "stop"}


def test_aborted_requests_end_and_free_their_slots_while_others_go_on(
    running: RunningAgents, model: Path, references: tuple[Greedy, ...]
) -> None:
    requests = requests_of(references)
    long_ones = [r.number for r in requests if r.max_tokens >= 27]
    with running.engine(make_plan(model, *THREE_IN_A_ROW), model, max_concurrency=16) as engine:
        outcome = Outcome()
        outcome.note(engine.submit(requests))
        aborted = [long_ones[0], long_ones[-1]]  # one in flight, one that waits
        assert aborted[0] < 16 <= aborted[1]
        for number in aborted:
            outcome.note(engine.abort(number))
        while len(outcome.reasons) < len(requests):
            engine.step(STEP_MS, on_events=outcome.note)
        ask_counters(engine)
        left = ask_counters(engine)

    assert {number for number, reason in outcome.reasons.items() if reason == "abort"} == set(aborted)
    for request, reference in zip(requests, references, strict=True):
        if request.number not in aborted:
            assert tuple(outcome.tokens[request.number]) == reference.output
    assert {counted.kv_peak_tokens for counted in left.values()} == {0}


# Plans that cannot be served


def test_a_request_whose_logits_are_not_finite_ends_alone(
    running: RunningAgents, model: Path, references: tuple[Greedy, ...], tmp_path: Path
) -> None:
    """A token's embedding is NaN; half of the requests have it in their prompt."""
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][200] = math.nan
    save_file(tensors, directory / "model.safetensors")
    requests = requests_of(references[:8])
    spoilt = [Request(number=100 + r.number, prompt=(*r.prompt, 200), max_tokens=5) for r in requests]

    with running.engine(make_plan(directory, *THREE_IN_A_ROW), directory) as engine:
        outcome = run_to_end(engine, [*requests, *spoilt])
        held = dict(engine.coordinator.kv_held_tokens)

    assert [tuple(outcome.tokens[r.number]) for r in requests] == [r.output for r in references[:8]]
    assert {outcome.reasons[r.number] for r in spoilt} == {"error"}
    assert sum(held.values()) == 0


def served(running: RunningAgents, plan: Plan, model: Path) -> None:
    with Agents({node: running.addresses[node] for node in plan.placement}, running.key) as agents:
        load_plan(agents, plan, ModelFiles(str(model)))


def test_a_plan_of_nodes_that_were_not_measured_cannot_be_served(running: RunningAgents, model: Path) -> None:
    plan = make_plan(model, *ONE_NODE, kv_capacity_tokens=None)
    with pytest.raises(InputError, match=r"plan: nodes\.n0\.kv_capacity_tokens is missing; only a plan of a cluster"):
        served(running, plan, model)


def test_a_plan_for_more_memory_than_a_node_has_names_the_node(running: RunningAgents, model: Path) -> None:
    plan = make_plan(model, *THREE_IN_A_ROW, kv_capacity_tokens=5_000_000)
    with pytest.raises(AgentFailedError, match=r"node n\d: layers \[\d,\d\) take .* of the 5000000 needed") as raised:
        served(running, plan, model)
    assert raised.value.exit_code == 2


def test_a_node_with_other_model_files_is_named(
    running: RunningAgents, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelFiles, "digest", lambda _files: "sha256:of another model")
    with pytest.raises(AgentFailedError, match=r"node n0: model .*: its files on this node differ") as raised:
        served(running, make_plan(model, *ONE_NODE), model)
    assert raised.value.exit_code == 2
