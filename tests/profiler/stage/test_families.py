"""What admits a family: its stages' tokens are those of transformers' ``generate``, however the model is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.conftest import GreedyOf, ModelDir
from tests.greedy import FAMILIES, Greedy
from tests.profiler.stage.schedules import Part, run_schedule, stage_of

CHUNK = 19  # tokens of a prompt that enter at once
# Name -> the ways through the model, each as the ranges of its stages with the layer that a sequence enters them at.
PLANS: dict[str, tuple[tuple[tuple[int, int, int], ...], ...]] = {
    "whole": (((0, 6, 0),),),
    "two stages": (((0, 2, 0), (2, 6, 2)),),
    "six stages": (tuple((layer, layer + 1, layer) for layer in range(6)),),
    "overlapping": (((0, 3, 0), (1, 6, 3)), ((0, 1, 0), (1, 6, 1)), ((0, 3, 0), (2, 5, 3), (4, 6, 5))),
}


def schedule_of(requests: Sequence[Greedy]) -> list[list[Part]]:
    """Prompts in chunks, one request starting after the other, each decoding its output beside the others."""
    waiting = [
        [min(CHUNK, len(one.prompt) - at) for at in range(0, len(one.prompt), CHUNK)] + [1] * (len(one.output) - 1)
        for one in requests
    ]
    steps = max(number + len(sizes) for number, sizes in enumerate(waiting))
    return [
        [(number, sizes[step - number]) for number, sizes in enumerate(waiting) if 0 <= step - number < len(sizes)]
        for step in range(steps)
    ]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(model_dir: ModelDir, greedy_of: GreedyOf, family: str, plan: str) -> None:
    references = greedy_of(family)[:16]
    sequences = [torch.tensor(one.prompt + one.output[:-1]) for one in references]
    stages = {
        (start, end): stage_of(model_dir(family), start, end, kv_capacity_tokens=2000)
        for start, end in {(start, end) for way in PLANS[plan] for start, end, _ in way}
    }
    ways = [[(stages[start, end], entry) for start, end, entry in way] for way in PLANS[plan]]

    found = run_schedule(
        [ways[number % len(ways)] for number in range(len(sequences))], sequences, schedule_of(references)
    )

    # Every token follows from the reference's tokens before it: by induction, what is generated is the reference.
    tokens = [
        tuple(int(found[number, position].argmax()) for position in range(len(one.prompt) - 1, len(sequence)))
        for number, (one, sequence) in enumerate(zip(references, sequences, strict=True))
    ]
    assert tokens == [one.output for one in references]
    assert len({token for output in tokens for token in output}) > 40, "outputs that repeat themselves prove nothing"
