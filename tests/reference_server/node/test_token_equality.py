"""A served plan answers token for token what transformers answers for the whole model."""

from __future__ import annotations

import pytest

from helixbench.solver.scheduling.requests import Request
from tests.conftest import GreedyOf, ModelDir
from tests.greedy import FAMILIES, greedy_outputs, load_whole
from tests.reference_server.plans import OVERLAPPING, PLANS, make_plan
from tests.reference_server.running import Outcome, RunningAgents, step_to_end

PRESETS = FAMILIES


@pytest.mark.parametrize("preset", PRESETS)
def test_references_are_what_each_prompt_gives_alone(greedy_of: GreedyOf, model_dir: ModelDir, preset: str) -> None:
    model = load_whole(model_dir(preset))
    whole_outputs = [one for one in greedy_of(preset) if len(one.output) == 40]
    by_prompt = sorted(whole_outputs, key=lambda one: len(one.prompt))
    for reference in (by_prompt[0], by_prompt[-1]):  # with the most filling up, and with the least
        ((alone, _),) = greedy_outputs(model, [reference.prompt], 40)
        assert alone == reference.output


@pytest.mark.parametrize("preset", PRESETS)
def test_references_are_told_apart(greedy_of: GreedyOf, preset: str) -> None:
    references = greedy_of(preset)
    long_ones = [reference.output for reference in references if len(reference.output) >= 12]

    assert len(references) == 32
    assert len({len(reference.prompt) for reference in references}) >= 6
    assert len({len(reference.output) for reference in references}) >= 4
    assert len(set(long_ones)) == len(long_ones) >= 8
    assert min(len(set(output)) for output in long_ones) >= 4, "an output that only repeats itself proves nothing"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("preset", PRESETS)
def test_32_concurrent_requests_yield_what_generate_yields(
    running: RunningAgents, model_dir: ModelDir, greedy_of: GreedyOf, preset: str, plan: str
) -> None:
    references = greedy_of(preset)
    requests = [
        Request(number=number, prompt=reference.prompt, max_tokens=len(reference.output))
        for number, reference in enumerate(references)
    ]
    placement, paths = PLANS[plan]
    model = model_dir(preset)

    with running.engine(make_plan(model, placement, paths), model) as engine:
        outcome = Outcome()
        outcome.note(engine.submit(requests))
        assert engine.coordinator.num_in_flight == len(requests) == 32
        step_to_end(engine, outcome, len(requests))
        taken = {engine.pipelines[index] for index in outcome.pipelines.values()}

    assert [tuple(outcome.tokens[request.number]) for request in requests] == [r.output for r in references]
    assert set(outcome.reasons.values()) == {"length"}
    assert len(taken) == len(paths)
    if (placement, paths) == OVERLAPPING:
        late = [hop for hops in taken for hop in hops if hop.start > placement[hop.node][0]]
        assert {hop.node for hop in late} == {"n1", "n3"}
        assert {hop.start for hops in taken for hop in hops if hop.node == "n1"} == {2, 4}
