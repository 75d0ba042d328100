"""Drawn tokens and log probabilities of a served plan: those of the whole model, in any company and on any pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helixbench.reference_server.node.token_sampling import Draw, sample
from helixbench.solver.scheduling.requests import Request, TokenEvent
from helixbench.solver.scheduling.work import SamplingParams, Scores
from tests.conftest import ModelDir
from tests.greedy import load_whole
from tests.reference_server.plans import ONE_NODE, OVERLAPPING, make_plan
from tests.reference_server.running import Outcome, RunningAgents, run_to_end, step_to_end

PRESET = "test-llama"
PROMPT = tuple(range(40, 70))
NUM_TOKENS = 12


def requests(count: int) -> list[Request]:
    """Alike but for their seeds and filters."""
    sampling = [SamplingParams(1.2, 0.95, seed, top_k=(0, 7)[seed % 2], min_p=0.01) for seed in range(count)]
    return [
        Request(number=number, prompt=PROMPT, max_tokens=NUM_TOKENS, sampling=sampling[number])
        for number in range(count)
    ]


def drawn_from_the_whole_model(directory: Path, request: Request) -> list[int]:
    tokens: list[int] = []
    seed = request.sampling.seed
    assert seed is not None
    while len(tokens) < request.max_tokens:
        with torch.inference_mode():
            logits = load_whole(directory)(torch.tensor([[*request.prompt, *tokens]])).logits[0, -1]
        draw = Draw(request.sampling, seed, len(request.prompt) + len(tokens))
        tokens.append(int(sample(logits[None], [draw])))
    return tokens


@pytest.mark.parametrize("plan", [ONE_NODE, OVERLAPPING])
def test_seeded_tokens_are_those_of_the_whole_model_in_any_order(
    running: RunningAgents, model_dir: ModelDir, plan: tuple[dict[str, tuple[int, int]], list[tuple[list[str], float]]]
) -> None:
    model = model_dir(PRESET)
    asked = requests(6)
    with running.engine(make_plan(model, *plan), model) as engine:
        together = run_to_end(engine, asked).tokens
        alone = {}
        for request in reversed(asked):
            alone |= run_to_end(engine, [request]).tokens

    assert together == alone
    assert together == {request.number: drawn_from_the_whole_model(model, request) for request in asked}
    assert len({tuple(tokens) for tokens in together.values()}) > 4


def test_scores_are_those_of_the_whole_model(running: RunningAgents, model_dir: ModelDir) -> None:
    """On pipelines of two nodes, the last of which never sees a token id of the prompt otherwise."""
    model = model_dir(PRESET)
    sampling = SamplingParams(num_logprobs=3)
    asked = [
        Request(number=n, prompt=PROMPT[n:], max_tokens=4, sampling=sampling, is_prompt_scored=n != 1) for n in range(4)
    ]
    found: dict[int, list[Scores]] = {}

    class Scored(Outcome):
        def note(self, events: list[TokenEvent]) -> list[Request]:  # type: ignore[override]
            for event in events:
                assert event.scores is not None
                found.setdefault(event.request, []).append(event.scores)
            return super().note(events)

    with running.engine(make_plan(model, *OVERLAPPING), model) as engine:
        outcome = Scored()
        outcome.note(engine.submit(asked))
        step_to_end(engine, outcome, len(asked))
        outputs = outcome.tokens

    for request in asked:
        whole = torch.tensor([[*request.prompt, *outputs[request.number]]])
        with torch.inference_mode():
            expected = load_whole(model)(whole).logits[0].log_softmax(-1)  # [T, V]
        first, *rest = found[request.number]
        scores = [*first.prompt, first.output, *(one.output for one in rest)]
        start = 0 if request.is_prompt_scored else len(request.prompt) - 1
        assert all(not one.prompt for one in rest)
        assert len(scores) == whole.shape[1] - 1 - start
        for place, one in enumerate(scores, start=start):
            assert one.logprob == pytest.approx(float(expected[place, whole[0, place + 1]]), abs=1e-4)
            assert [value for _, value in one.top] == pytest.approx(expected[place].topk(3).values.tolist(), abs=1e-4)
